# `just` alone lists these. What a recipe needs and does not find, it names with the command that installs it.
set shell := ["bash", "-uc"]

_default:
    @just --list --unsorted

# boot the tiny guest of fixtures/hello.toml (or any CONFIG)
run CONFIG="fixtures/hello.toml" *ARGS:
    cargo run --release -- {{ARGS}} {{CONFIG}}

# unit, property, guest, hostile-guest and QMP tests; no network, no root needed (what is skipped says so)
test *ARGS:
    cargo test --no-fail-fast {{ARGS}}
    [ -n '{{ARGS}}' ] || cargo test --no-fail-fast --features luks --test luks --test qcow2_together

# formatting, clippy with warnings as errors, documentation
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    cargo clippy --features luks --lib --test luks --test qcow2_together -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet

# stock Debian Linux as the guest (see tests/lab/README.md)
lab *SCENARIOS:
    tests/lab/run {{SCENARIOS}}

# the QMP dialogues recorded from QEMU (TRANSCRIPTS=folder with replay.py)
transcripts *NAMES:
    tests/transcripts/run {{NAMES}}

# the long runs of the property, crash and stress tests: MINUTES each
soak MINUTES="10":
    SOAK=$(( {{MINUTES}} * 60 )) cargo test --release -- --nocapture --test-threads 1
    SOAK=$(( {{MINUTES}} * 60 )) cargo test --release --features luks --test luks --test qcow2_together -- --nocapture --test-threads 1

# libFuzzer on the qcow2 driver: MINUTES, from the kept inputs on (cargo-fuzz and a nightly toolchain)
fuzz MINUTES="60":
    #!/usr/bin/env bash
    set -euo pipefail
    command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing: cargo install cargo-fuzz"; exit 1; }
    rustup toolchain list | grep -q nightly || { echo "a nightly toolchain is missing: rustup toolchain install nightly"; exit 1; }
    mkdir -p target/fuzz/corpus target/fuzz/found
    grep -v '^#' fixtures/fuzz/qcow2.hex | while read -r line; do
      printf "$(sed 's/../\\x&/g' <<<"$line")" >"target/fuzz/corpus/$(md5sum <<<"$line" | cut -c1-16)"
    done
    cargo +nightly fuzz run --fuzz-dir tests/fuzz -s none --target-dir target/fuzz qcow2 target/fuzz/corpus -- \
      -max_total_time=$(( {{MINUTES}} * 60 )) -max_len=200 -len_control=0 -timeout=60 -rss_limit_mb=1024 -artifact_prefix=target/fuzz/found/

# start-up, memory, fleet, disk and QMP against the raw floor and QEMU, as ratios
bench *ARGS:
    cargo bench --bench bench -- {{ARGS}}
