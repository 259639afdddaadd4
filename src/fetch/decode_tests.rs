use std::fs::File;
use std::io::Write;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const ALL: [Codec; 4] = [Codec::Gzip, Codec::Xz, Codec::Zstd, Codec::Bzip2];
const NO_LIMIT: u64 = u64::MAX;

/// Bytes that compress about two to one, with a run of zeroes, as an image has.
fn content(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes: Vec<u8> = (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            b"abcdefghijklmnop"[usize::try_from(state >> 60).unwrap()]
        })
        .collect();
    bytes[len / 3..len / 2].fill(0);
    bytes
}

/// One member, with all checksums that the format has.
fn encode(codec: Codec, bytes: &[u8]) -> Vec<u8> {
    match codec {
        Codec::Gzip => {
            let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
            to.write_all(bytes).unwrap();
            to.finish().unwrap()
        }
        Codec::Xz => {
            let mut to = liblzma::write::XzEncoder::new(Vec::new(), 1);
            to.write_all(bytes).unwrap();
            to.finish().unwrap()
        }
        Codec::Zstd => {
            let mut context = zstd_safe::CCtx::create();
            context.set_parameter(zstd_safe::CParameter::ChecksumFlag(true)).unwrap();
            let mut to = vec![0; zstd_safe::compress_bound(bytes.len())];
            let len = context.compress2(&mut to[..], bytes).unwrap();
            to.truncate(len);
            to
        }
        Codec::Bzip2 => {
            let mut to = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
            to.write_all(bytes).unwrap();
            to.finish().unwrap()
        }
    }
}

/// Decodes a whole stream in calls of the given sizes, and checks what each call promises.
fn drive(
    codec: Codec,
    stream: &[u8],
    max_output_bytes: u64,
    mut sizes: impl FnMut() -> (usize, usize),
) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = Decoder::new(codec, Limits { max_output_bytes })?;
    let (mut output, mut at) = (Vec::new(), 0);
    loop {
        let (most_in, most_out) = sizes();
        let input = &stream[at..stream.len().min(at + most_in)];
        let mut room = vec![0xee; most_out];
        let step = match decoder.decode(input, &mut room) {
            Ok(step) => step,
            Err(error) => {
                assert_eq!(decoder.decode(input, &mut room), Err(error), "it went on");
                assert_eq!(decoder.finish(), Err(error));
                assert_eq!(error.class(), Class::Refuse);
                return Err(error);
            }
        };
        at += step.read;
        output.extend_from_slice(&room[..step.written]);
        assert_eq!(decoder.read_bytes(), at as u64);
        assert_eq!(decoder.written_bytes(), output.len() as u64);
        assert!(step.read + step.written > 0 || input.is_empty(), "no progress");
        match step.state {
            State::OutputFull => assert_eq!(step.written, most_out),
            State::NeedsInput | State::MemberEnd => {
                assert_eq!(step.read, input.len());
                let ended = decoder.finish();
                assert!(ended.is_ok() || step.state == State::NeedsInput || codec == Codec::Xz);
                if at == stream.len() {
                    return ended.map(|()| output);
                }
            }
        }
    }
}

fn decode(codec: Codec, stream: &[u8]) -> Result<Vec<u8>, DecodeError> {
    drive(codec, stream, NO_LIMIT, || (1 << 16, 1 << 16))
}

fn decode_bytewise(codec: Codec, stream: &[u8]) -> Result<Vec<u8>, DecodeError> {
    drive(codec, stream, NO_LIMIT, || (1, 1))
}

/// Without the tools a test says that it is skipped, or fails with `REQUIRE_TOOLS=1`.
fn have_tools() -> bool {
    let runs = |tool: &&str| Command::new(tool).arg("--version").output().is_ok();
    if ["gzip", "xz", "zstd", "bzip2"].iter().all(runs) {
        return true;
    }
    println!("SKIPPED: gzip, xz, zstd or bzip2 is not installed");
    assert!(std::env::var("REQUIRE_TOOLS").as_deref() != Ok("1"), "REQUIRE_TOOLS=1");
    false
}

/// What a tool makes of a file called `image.raw` with these bytes.
fn tool(bytes: &[u8], command: &str) -> Vec<u8> {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("image.raw");
    File::create(&path).unwrap().write_all(bytes).unwrap();
    let mut words = command.split(' ');
    let output =
        Command::new(words.next().unwrap()).args(words).arg("-c").arg(&path).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn what_the_tools_write_is_read_back() {
    if !have_tools() {
        return;
    }
    let commands = [
        (Codec::Gzip, &["gzip -1", "gzip -6", "gzip -9 -n"][..]),
        (
            Codec::Xz,
            &[
                "xz -0",
                "xz -6 --check=sha256",
                "xz -9e --check=crc32",
                "xz -1 --check=none",
                "xz -1 -T2 --block-size=64KiB",
                "xz --x86 --lzma2=preset=1",
                "xz --delta=dist=4 --lzma2=preset=1",
            ][..],
        ),
        (
            Codec::Zstd,
            &[
                "zstd -1",
                "zstd -3 --no-check",
                "zstd -9 -T2 -B512K",
                "zstd --ultra -22",
                "zstd -3 --long=27",
            ][..],
        ),
        (Codec::Bzip2, &["bzip2 -1", "bzip2 -9"][..]),
    ];
    for len in [0, 1, 300_000] {
        let bytes = if len < 3 { vec![b'x'; len] } else { content(len) };
        for (codec, command) in commands.iter().flat_map(|(c, all)| all.iter().map(|o| (*c, *o))) {
            let stream = tool(&bytes, command);
            assert_eq!(Codec::sniff(&stream), Some(codec), "{command}, {len} bytes");
            assert!(decode(codec, &stream).as_ref() == Ok(&bytes), "{command}, {len} bytes");
            let twice = [&stream[..], &stream[..]].concat();
            let wanted = [&bytes[..], &bytes[..]].concat();
            assert!(decode(codec, &twice).as_ref() == Ok(&wanted), "{command}, {len} bytes twice");
        }
    }
}

#[test]
fn a_codec_is_known_by_its_first_six_bytes_only() {
    for codec in ALL {
        for bytes in [&b""[..], b"some bytes"] {
            let stream = encode(codec, bytes);
            assert_eq!(Codec::sniff(&stream), Some(codec));
            assert_eq!(Codec::sniff(&stream[..6]), Some(codec));
            assert_eq!(Codec::sniff(&stream[..5]), None, "too few bytes to know");
        }
    }
    assert_eq!(Codec::sniff(&[0x53, 0x2a, 0x4d, 0x18, 0, 0]), Some(Codec::Zstd));
    for other in [&b"QFI\xfb\0\0\0\x03"[..], &[0; 512], b"BZhello", &[0x1f, 0x8b, 8, 0xff, 0, 0]] {
        assert_eq!(Codec::sniff(other), None);
    }
}

#[test]
fn members_follow_each_other_also_in_calls_of_one_byte() {
    for codec in ALL {
        let parts = [&b"first"[..], b"", b"and the last"].map(|part| encode(codec, part));
        let stream = parts.concat();
        assert_eq!(decode(codec, &stream).unwrap(), b"firstand the last");
        assert_eq!(decode_bytewise(codec, &stream).unwrap(), b"firstand the last");
    }
}

#[test]
fn zstd_skips_skippable_frames_anywhere() {
    let skipped = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"any"].concat();
    let frame = encode(Codec::Zstd, b"data");
    let stream = [&skipped[..], &frame, &skipped, &skipped, &frame, &skipped].concat();
    assert_eq!(decode(Codec::Zstd, &stream).unwrap(), b"datadata");
    assert_eq!(decode_bytewise(Codec::Zstd, &stream).unwrap(), b"datadata");
    let cut = &stream[..stream.len() - 1];
    assert!(matches!(decode(Codec::Zstd, cut), Err(DecodeError::Truncated { .. })));
}

#[test]
fn zeroes_may_follow_gzip_and_xz_in_fours() {
    let with = |codec, zeroes: usize, more: &[u8]| {
        let stream = [&encode(codec, b"data")[..], &vec![0; zeroes], more].concat();
        let result = decode(codec, &stream);
        assert_eq!(result.is_ok(), decode_bytewise(codec, &stream).is_ok());
        result
    };
    for zeroes in [1, 4, 511, 100_000] {
        assert_eq!(with(Codec::Gzip, zeroes, b"").unwrap(), b"data");
        let error = with(Codec::Gzip, zeroes, &encode(Codec::Gzip, b"more")).unwrap_err();
        assert!(matches!(error, DecodeError::TrailingGarbage { .. }), "gzip ignores it too");
        for codec in [Codec::Zstd, Codec::Bzip2] {
            let at = encode(codec, b"data").len() as u64;
            assert_eq!(with(codec, zeroes, b""), Err(DecodeError::TrailingGarbage { codec, at }));
        }
    }
    let stream = encode(Codec::Xz, b"more");
    for zeroes in [4, 8, 100_000] {
        assert_eq!(with(Codec::Xz, zeroes, b"").unwrap(), b"data");
        assert_eq!(with(Codec::Xz, zeroes, &stream).unwrap(), b"datamore");
    }
    for zeroes in [1, 6, 7] {
        let error = with(Codec::Xz, zeroes, b"").unwrap_err();
        assert!(matches!(error, DecodeError::Truncated { .. }));
        let error = with(Codec::Xz, zeroes, &stream).unwrap_err();
        assert!(matches!(error, DecodeError::TrailingGarbage { .. }));
    }
}

#[test]
fn a_stream_cut_at_any_byte_is_refused() {
    for codec in ALL {
        let stream = encode(codec, &content(600));
        for cut in 0..stream.len() {
            let error = decode(codec, &stream[..cut]).unwrap_err();
            assert_eq!(error, DecodeError::Truncated { codec, at: cut as u64 });
            let error = decode_bytewise(codec, &stream[..cut]).unwrap_err();
            assert_eq!(error, DecodeError::Truncated { codec, at: cut as u64 });
        }
    }
}

/// Whether a bit carries neither data nor a check: a time, a hint, or padding to a whole byte.
fn is_free_bit(codec: Codec, byte: usize, bit: u32, len: usize) -> bool {
    match codec {
        // FTEXT, MTIME, XFL and OS; and the end of the last deflate byte.
        Codec::Gzip => (byte, bit) == (3, 0) || (4..10).contains(&byte) || byte == len - 9,
        // LZMA's lc, lp and pb: which bits of the data choose a context; all may be the same.
        Codec::Xz => byte == 29,
        // "Unused bit" of the frame header descriptor; and the bits that fill the Huffman weights'
        // description up to a byte.
        Codec::Zstd => (byte, bit) == (4, 4) || (byte, bit) == (15, 7),
        // The block size, which is a bound; "randomised", which starts after more bytes than are
        // here; and the end of the last byte.
        Codec::Bzip2 => byte == 3 || (byte, bit) == (14, 7) || byte == len - 1,
    }
}

#[test]
fn a_flipped_bit_is_an_error_or_changes_nothing() {
    for codec in ALL {
        let bytes = content(600);
        let stream = encode(codec, &bytes);
        let mut accepted = 0;
        for byte in 0..stream.len() {
            for bit in 0..8 {
                let mut damaged = stream.clone();
                damaged[byte] ^= 1 << bit;
                match decode(codec, &damaged) {
                    Ok(same) => {
                        assert!(same == bytes, "{codec}: byte {byte}, bit {bit}: other bytes");
                        let free = is_free_bit(codec, byte, bit, stream.len());
                        assert!(free, "{codec}: byte {byte} of {}, bit {bit}", stream.len());
                        accepted += 1;
                    }
                    Err(error) => assert!(!error.to_string().is_empty()),
                }
            }
        }
        println!("{codec}: {accepted} of {} bits are free", stream.len() * 8);
        assert!(accepted < 64, "{codec}: {accepted} flipped bits went unnoticed");
    }
}

#[test]
fn bytes_after_the_end_are_refused_at_their_place() {
    for codec in ALL {
        let stream = encode(codec, b"data");
        for garbage in [&b"x"[..], b"garbage of some length", &[0xff; 40]] {
            let all = [&stream[..], garbage].concat();
            let wanted = Err(DecodeError::TrailingGarbage { codec, at: stream.len() as u64 });
            assert_eq!(decode(codec, &all), wanted);
            assert_eq!(decode_bytewise(codec, &all), wanted);
        }
        // What starts as a member may be one that was cut.
        let all = [&stream[..], &stream[..3]].concat();
        assert!(matches!(decode(codec, &all), Err(DecodeError::Truncated { .. })));
        let other = encode(if codec == Codec::Xz { Codec::Gzip } else { Codec::Xz }, b"data");
        assert!(matches!(decode(codec, &other), Err(DecodeError::Corrupt { at: 0, .. })));
    }
}

#[test]
fn the_output_limit_is_exact_and_named() {
    let bytes = content(200_000);
    for codec in ALL {
        let one = encode(codec, &bytes);
        for (stream, len) in [(one.clone(), 200_000), ([&one[..], &one].concat(), 400_000)] {
            for room in [1 << 20, 4096, 7] {
                let run = |limit| drive(codec, &stream, limit, || (1 << 14, room));
                assert_eq!(run(len).unwrap().len() as u64, len, "{codec}");
                for limit in [len - 1, len / 2, 1, 0] {
                    let error = run(limit).unwrap_err();
                    let DecodeError::TooLarge { max_output_bytes, .. } = error else {
                        panic!("{codec}: {error}");
                    };
                    assert_eq!(max_output_bytes, limit);
                }
            }
        }
        assert_eq!(drive(codec, &encode(codec, b""), 0, || (9, 9)).unwrap(), b"");
    }
}

#[test]
fn zeroes_at_thousands_to_one_are_no_bomb() {
    for codec in ALL {
        let stream = encode(codec, &vec![0; 8 << 20]);
        let mut decoder = Decoder::new(codec, Limits { max_output_bytes: 8 << 20 }).unwrap();
        let (mut at, mut room) = (0, vec![1; 1 << 16]);
        while decoder.finish().is_err() {
            let step = decoder.decode(&stream[at..], &mut room).unwrap();
            assert!(room[..step.written].iter().all(|&byte| byte == 0));
            at += step.read;
        }
        assert_eq!((decoder.written_bytes(), at), (8 << 20, stream.len()));
    }
}

#[test]
fn xz_with_a_huge_dictionary_is_refused_by_its_header() {
    // Stream header 12 bytes, then: block header size, flags, filter id, size of properties,
    // dictionary size, padding, CRC-32.
    let stream = encode(Codec::Xz, b"data");
    assert_eq!(stream[12..16], [2, 0, 0x21, 1], "the layout that the test relies on");
    let with_dictionary = |code: u8| {
        let mut stream = stream.clone();
        stream[16] = code;
        let crc = crc32fast::hash(&stream[12..20]).to_le_bytes();
        stream[20..24].copy_from_slice(&crc);
        decode(Codec::Xz, &stream)
    };
    assert_eq!(with_dictionary(31).unwrap(), b"data", "192 MiB");
    for code in [32, 36, 40] {
        let wanted = DecodeError::NeedsMemory { codec: Codec::Xz, at: 24, limit_bytes: 256 << 20 };
        assert_eq!(with_dictionary(code), Err(wanted));
    }
}

#[test]
fn zstd_with_a_huge_window_is_refused_by_its_header() {
    // Magic, descriptor (no content size), window descriptor, a last raw block of 2 bytes.
    let with_window = |log: u8| {
        decode(Codec::Zstd, &[0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3, 17, 0, 0, 1, 2])
    };
    assert_eq!(with_window(27).unwrap(), [1, 2]);
    for log in [28, 31, 41] {
        let error = with_window(log).unwrap_err();
        assert!(matches!(error, DecodeError::NeedsMemory { codec: Codec::Zstd, .. }), "{error}");
    }
}

/// A member with these header flags and fields, and the low half of a checksum if flag 2 says so.
fn gzip_with(flags: u8, fields: &[u8], crc_change: u16) -> Vec<u8> {
    let plain = encode(Codec::Gzip, b"data");
    let mut stream = [&[0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 3][..], fields].concat();
    if flags & 2 != 0 {
        let low = u16::try_from(crc32fast::hash(&stream) & 0xffff).unwrap();
        stream.extend_from_slice(&(low ^ crc_change).to_le_bytes());
    }
    stream.extend_from_slice(&plain[10..]);
    stream
}

#[test]
fn gzip_header_fields_are_passed_over_and_their_checksum_is_held() {
    let (extra, text) = (&[3, 0, 7, 0, 7][..], &b"name\0"[..]);
    let cases = [
        (1, vec![]),
        (2, vec![]),
        (4, vec![0, 0]),
        (4, extra.to_vec()),
        (8, text.to_vec()),
        (16, text.to_vec()),
        (31, [extra, text, b"\0"].concat()),
        (31, [extra, b"\0", text].concat()),
    ];
    for (flags, fields) in cases {
        let stream = gzip_with(flags, &fields, 0);
        assert_eq!(decode(Codec::Gzip, &stream).unwrap(), b"data", "flags {flags}");
        assert_eq!(decode_bytewise(Codec::Gzip, &stream).unwrap(), b"data", "flags {flags}");
    }
    let wrong = decode(Codec::Gzip, &gzip_with(2, &[], 1)).unwrap_err();
    assert!(matches!(wrong, DecodeError::Corrupt { at: 12, .. }), "{wrong}");
    let reserved = decode(Codec::Gzip, &gzip_with(0x20, &[], 0)).unwrap_err();
    assert!(matches!(reserved, DecodeError::Corrupt { at: 10, .. }), "{reserved}");
}

#[test]
fn a_wrong_checksum_is_corruption_at_the_end_of_the_member() {
    for codec in [Codec::Gzip, Codec::Zstd] {
        let mut stream = encode(codec, b"data");
        let len = stream.len();
        // The CRC-32 before the length, and the low half of an XXH64.
        stream[if codec == Codec::Gzip { len - 8 } else { len - 1 }] ^= 1;
        let error = decode_bytewise(codec, &stream).unwrap_err();
        let DecodeError::Corrupt { at, .. } = error else { panic!("{error}") };
        assert!(at + 1 >= len as u64, "{codec}: {at}");
    }
}

#[test]
fn calls_without_input_or_room_do_nothing_however_many() {
    for codec in ALL {
        let mut decoder = Decoder::new(codec, Limits { max_output_bytes: 100 }).unwrap();
        let stream = encode(codec, b"data");
        let (start, rest) = stream.split_at(7);
        let idle = |state| Ok(Step { read: 0, written: 0, state });
        let mut room = [0; 16];
        for _ in 0..100 {
            assert_eq!(decoder.decode(&[], &mut room), idle(State::NeedsInput));
            assert_eq!(decoder.decode(start, &mut []), idle(State::OutputFull));
        }
        assert_eq!(decoder.decode(start, &mut room).unwrap().read, 7);
        for _ in 0..100 {
            assert_eq!(decoder.decode(&[], &mut room), idle(State::NeedsInput));
            assert_eq!(decoder.decode(rest, &mut []), idle(State::OutputFull));
        }
        let step = decoder.decode(rest, &mut room).unwrap();
        assert_eq!((step.read, step.written, step.state), (rest.len(), 4, State::MemberEnd));
        for _ in 0..100 {
            assert_eq!(decoder.decode(&[], &mut room), idle(State::MemberEnd));
        }
        assert_eq!(decoder.finish(), Ok(()));
    }
}

fn any_codec() -> impl Strategy<Value = Codec> {
    prop::sample::select(&ALL[..])
}

/// Sizes of calls, over and over.
fn cycle(sizes: &[(usize, usize)]) -> impl FnMut() -> (usize, usize) {
    let mut next = sizes.iter().copied().cycle();
    move || next.next().unwrap()
}

fn any_sizes() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let size = || prop_oneof![1..4_usize, 1..300_usize, Just(1 << 16)];
    prop::collection::vec((size(), size()), 1..20)
}

proptest! {
    #[test]
    fn any_split_gives_the_same_bytes(
        codec in any_codec(),
        lens in prop::collection::vec(3..5000_usize, 1..4),
        sizes in any_sizes(),
    ) {
        let parts: Vec<Vec<u8>> = lens.iter().map(|&len| content(len)).collect();
        let stream: Vec<u8> = parts.iter().flat_map(|part| encode(codec, part)).collect();
        let whole = drive(codec, &stream, NO_LIMIT, || (usize::MAX >> 1, 1 << 16)).unwrap();
        prop_assert!(whole == parts.concat());
        prop_assert!(drive(codec, &stream, NO_LIMIT, cycle(&sizes)).unwrap() == whole);
    }

    #[test]
    fn any_damage_is_met_the_same_in_any_split(
        codec in any_codec(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        sizes in any_sizes(),
    ) {
        let mut stream = encode(codec, &content(900));
        for (index, byte) in &damage {
            let at = index.index(stream.len());
            stream[at] = *byte;
        }
        stream.truncate(cut.index(stream.len() + 1));
        let whole = drive(codec, &stream, 1 << 20, || (usize::MAX >> 1, 1 << 16));
        let split = drive(codec, &stream, 1 << 20, cycle(&sizes));
        prop_assert_eq!(whole.ok(), split.ok());
    }

    #[test]
    fn any_bytes_after_a_magic_number_end_in_a_result(
        codec in any_codec(),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        keep in 0..20_usize,
        sizes in any_sizes(),
    ) {
        let start = encode(codec, b"data");
        let stream = [&start[..keep.min(start.len())], &bytes].concat();
        let whole = drive(codec, &stream, 1 << 20, || (usize::MAX >> 1, 1 << 16));
        let split = drive(codec, &stream, 1 << 20, cycle(&sizes));
        prop_assert_eq!(whole.ok(), split.ok());
    }
}
