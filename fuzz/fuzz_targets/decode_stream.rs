//! Any bytes as a compressed stream: the same bytes or an error, whole and in pieces, within the
//! output limit. The first byte chooses the codec, the next two the sizes of the pieces.
#![no_main]

use bedplate::fetch::decode::{Codec, DecodeError, Decoder, Limits, State};
use libfuzzer_sys::fuzz_target;

const MAX_OUTPUT_BYTES: u64 = 1 << 20;

fn drive(codec: Codec, stream: &[u8], piece: usize, room: usize) -> Result<Vec<u8>, DecodeError> {
    let limits = Limits { max_output_bytes: MAX_OUTPUT_BYTES };
    let mut decoder = Decoder::new(codec, limits)?;
    let (mut output, mut room, mut at) = (Vec::new(), vec![0; room], 0_usize);
    loop {
        let input = &stream[at..stream.len().min(at.saturating_add(piece))];
        let step = decoder.decode(input, &mut room)?;
        assert!(step.read + step.written > 0 || input.is_empty(), "no progress");
        output.extend_from_slice(&room[..step.written]);
        assert!(output.len() as u64 <= MAX_OUTPUT_BYTES, "more than the limit");
        at += step.read;
        match step.state {
            State::OutputFull => assert_eq!(step.written, room.len()),
            State::NeedsInput | State::MemberEnd => {
                assert_eq!(step.read, input.len(), "input left");
                if at == stream.len() {
                    return decoder.finish().map(|()| output);
                }
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let [choice, piece, room, stream @ ..] = data else { return };
    let codec = match choice & 3 {
        0 => Codec::Gzip,
        1 => Codec::Xz,
        2 => Codec::Zstd,
        _ => Codec::Bzip2,
    };
    let _any_answer_is_good = Codec::sniff(stream);
    let whole = drive(codec, stream, usize::MAX, 1 << 16);
    let pieces = drive(codec, stream, usize::from(*piece) + 1, usize::from(*room) * 16 + 1);
    assert_eq!(whole.ok(), pieces.ok(), "the split matters");
});
