//! Tests of `codec`: what a stream may be, as qemu has it.

use proptest::prelude::*;

use super::*;

const LEN: usize = 65_536;

/// A cluster that compresses to some extent.
fn cluster() -> Vec<u8> {
    (0..LEN).map(|n| u8::try_from((n * n / 77) % 61).unwrap()).collect()
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; bytes.len() * 2 + 1024];
    let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
    let len = compressor.deflate_compress(bytes, &mut out).unwrap();
    out.truncate(len);
    out
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; bytes.len() + 1024];
    let len = zstd_safe::compress(out.as_mut_slice(), bytes, 3).unwrap();
    out.truncate(len);
    out
}

fn decode(compression: Compression, stored: &[u8]) -> Result<Vec<u8>, CodecFault> {
    let mut out = vec![0xee; LEN];
    Codec::new().decode(compression, stored, &mut out).map(|()| out)
}

#[test]
fn both_kinds_give_back_the_cluster() {
    assert_eq!(decode(Compression::Zlib, &deflate(&cluster())), Ok(cluster()));
    assert_eq!(decode(Compression::Zstd, &zstd(&cluster())), Ok(cluster()));
}

#[test]
fn a_usual_deflate_stream_never_meets_the_slower_decoder() {
    let padded = [deflate(&cluster()), vec![0; 511]].concat();
    let mut codec = Codec::new();
    codec.decode(Compression::Zlib, &padded, &mut vec![0; LEN]).unwrap();
    assert!(codec.inflate.is_none());
}

#[test]
fn what_follows_the_stream_is_ignored() {
    let tail = [0x55; 700];
    assert_eq!(
        decode(Compression::Zlib, &[deflate(&cluster()), tail.into()].concat()),
        Ok(cluster())
    );
    assert_eq!(decode(Compression::Zstd, &[zstd(&cluster()), tail.into()].concat()), Ok(cluster()));
}

#[test]
fn a_deflate_stream_that_goes_on_gives_its_first_cluster() {
    for more in [1, 50 << 20] {
        let long = [cluster(), vec![0; more]].concat();
        assert_eq!(decode(Compression::Zlib, &deflate(&long)), Ok(cluster()), "{more} bytes more");
    }
}

#[test]
fn a_deflate_stream_without_an_end_counts_if_it_fills_the_cluster() {
    // One stored block, not marked as the last one.
    let mut stream = Vec::new();
    for block in cluster().chunks(32_768) {
        let len = u16::try_from(block.len()).unwrap();
        stream.push(0);
        stream.extend(len.to_le_bytes());
        stream.extend((!len).to_le_bytes());
        stream.extend(block);
    }
    assert_eq!(decode(Compression::Zlib, &stream), Ok(cluster()));
    stream.pop();
    assert_eq!(decode(Compression::Zlib, &stream), Err(CodecFault::ShortDeflate));
}

#[test]
fn a_short_stream_is_an_error() {
    let short = &cluster()[..LEN - 1];
    assert_eq!(decode(Compression::Zlib, &deflate(short)), Err(CodecFault::ShortDeflate));
    assert_eq!(decode(Compression::Zstd, &zstd(short)), Err(CodecFault::ShortZstd));
    assert_eq!(decode(Compression::Zlib, &[]), Err(CodecFault::ShortDeflate));
    assert_eq!(decode(Compression::Zstd, &[]), Err(CodecFault::ShortZstd));
}

#[test]
fn a_zstd_frame_longer_than_the_cluster_is_an_error() {
    let long = [cluster(), vec![0; 1]].concat();
    assert!(decode(Compression::Zstd, &zstd(&long)).is_err());
}

#[test]
fn zstd_frames_are_read_until_the_cluster_is_full() {
    let (first, second) = (&cluster()[..1000], &cluster()[1000..]);
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let stored = [&skippable[..], &zstd(first), &zstd(&[]), &skippable, &zstd(second)].concat();
    assert_eq!(decode(Compression::Zstd, &stored), Ok(cluster()));
}

#[test]
fn skippable_frames_alone_end_without_a_cluster() {
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0].repeat(10_000);
    assert_eq!(decode(Compression::Zstd, &skippable), Err(CodecFault::ShortZstd));
}

#[test]
fn a_declared_window_of_128_mib_costs_no_memory() {
    // Frame without content size, window log 27, one RLE block, the last one, of 65536 bytes.
    let block = (65_536_u32 << 3 | 1 << 1 | 1).to_le_bytes();
    let frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0, (27 - 10) << 3][..], &block[..3], &[7]].concat();
    let mut codec = Codec::new();
    let mut out = vec![0; LEN];
    codec.decode(Compression::Zstd, &frame, &mut out).unwrap();
    assert!(out.iter().all(|&byte| byte == 7));
    assert!(codec.zstd.unwrap().sizeof() < 1 << 20);
    let mut wider = frame;
    wider[5] = (28 - 10) << 3;
    assert_eq!(decode(Compression::Zstd, &wider), Err(CodecFault::BadZstd));
}

#[test]
fn a_codec_works_after_an_error() {
    let mut codec = Codec::new();
    let mut out = vec![0; LEN];
    for compression in [Compression::Zlib, Compression::Zstd] {
        assert!(codec.decode(compression, &[0xff; 600], &mut out).is_err());
        let stored = match compression {
            Compression::Zlib => deflate(&cluster()),
            Compression::Zstd => zstd(&cluster()),
        };
        assert!(codec.decode(compression, &stored[..stored.len() / 2], &mut out).is_err());
        codec.decode(compression, &stored, &mut out).unwrap();
        assert_eq!(out, cluster());
    }
}

proptest! {
    #[test]
    fn any_stream_is_judged(stored in proptest::collection::vec(any::<u8>(), 0..3000)) {
        for compression in [Compression::Zlib, Compression::Zstd] {
            let mut out = vec![0; 512];
            let _no_panic = Codec::new().decode(compression, &stored, &mut out);
        }
    }

    #[test]
    fn a_damaged_stream_is_judged(at in 0..400_usize, bit in 0..8) {
        for (compression, mut stored) in
            [(Compression::Zlib, deflate(&cluster())), (Compression::Zstd, zstd(&cluster()))]
        {
            if let Some(byte) = stored.get_mut(at) {
                *byte ^= 1_u8 << bit;
            }
            let _no_panic = decode(compression, &stored);
        }
    }
}
