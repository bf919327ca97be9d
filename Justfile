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

# formatting, clippy with warnings as errors, documentation
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
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

# start-up, memory, fleet, disk and QMP against the raw floor and QEMU, as ratios
bench *ARGS:
    cargo bench --bench bench -- {{ARGS}}
