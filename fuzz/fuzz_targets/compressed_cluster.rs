//! Any bytes as a compressed cluster: a whole cluster or an error, with reused decoders too.
//! The first byte chooses the codec and the cluster size.
#![no_main]

use bedplate::image::qcow2::{Codec, Compression};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, stored)) = data.split_first() else { return };
    let compression = if choice & 1 == 0 { Compression::Zlib } else { Compression::Zstd };
    let len = 512_usize << ((choice >> 1) % 9);
    let mut codec = Codec::new();
    let mut first = vec![0xee; len];
    let mut second = vec![0x11; len];
    let result = codec.decode(compression, stored, &mut first);
    assert_eq!(result, codec.decode(compression, stored, &mut second), "a reused decoder differs");
    if result.is_ok() {
        assert!(first == second, "a byte was left as it was");
    }
});
