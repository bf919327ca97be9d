//! Compressed clusters: raw deflate with a window of 2^12 bytes, or Zstandard. No state.
//!
//! The input may be hostile: output is never longer than the buffer, a zstd frame may not ask for
//! a window of more than 8 MiB.

use super::header::Compression;
use std::io::{self, Read};
use zlib_rs::{Deflate, DeflateFlush, Inflate, InflateFlush, Status};

/// Bits of deflate's window in this format.
const WINDOW_BITS: u8 = 12;

/// zlib's own default.
const ZLIB_LEVEL: i32 = 6;

/// Fills `out`, one cluster, from `data`, which may go on behind the compressed stream.
///
/// # Errors
/// EIO when the data do not decompress to a whole cluster.
pub fn decompress(method: Compression, data: &[u8], out: &mut [u8]) -> io::Result<()> {
    let whole = match method {
        Compression::Zlib => {
            let mut inflate = Inflate::new(false, WINDOW_BITS);
            // The stream's own end need not have been seen when the cluster is full.
            inflate.decompress(data, out, InflateFlush::Finish).is_ok()
                && inflate.total_out() == out.len() as u64
        }
        Compression::Zstd => {
            let mut frame = ruzstd::decoding::FrameDecoder::new();
            frame.set_max_window_size(8 << 20);
            ruzstd::decoding::StreamingDecoder::new_with_decoder(data, frame)
                .is_ok_and(|mut stream| stream.read_exact(out).is_ok())
        }
    };
    if whole { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) }
}

/// One cluster compressed; `None` when that does not make it smaller.
pub fn compress(method: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let out = match method {
        Compression::Zlib => {
            let mut out = vec![0; data.len()];
            let mut deflate = Deflate::new(ZLIB_LEVEL, false, WINDOW_BITS);
            let done = deflate.compress(data, &mut out, DeflateFlush::Finish).ok()?;
            if done != Status::StreamEnd {
                return None;
            }
            out.truncate(deflate.total_out() as usize);
            out
        }
        Compression::Zstd => {
            let level = ruzstd::encoding::CompressionLevel::Fastest;
            ruzstd::encoding::compress_to_vec(data, level)
        }
    };
    (out.len() < data.len()).then_some(out)
}

#[cfg(test)]
#[path = "compress_test.rs"]
mod tests;
