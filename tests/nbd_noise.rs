//! A client of NBD held against what no server should say: the seeds of the fuzz target, and noise made of
//! them.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod nbd_words;

use std::path::Path;

use bedplate::ring::BufPool;
use nbd_words::{play, server};

fn seeds() -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/nbd_client");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        (name, std::fs::read(entry.path()).unwrap())
    };
    let mut seeds: Vec<_> = dir.read_dir().unwrap().map(read).collect();
    seeds.sort();
    seeds
}

#[test]
fn the_seeds_reach_the_end_of_an_export_or_their_error() {
    let pool = BufPool::new(10);
    let whole: Vec<_> = seeds()
        .iter()
        .filter(|(_, input)| play(&server(input), &pool))
        .map(|(name, _)| name.clone())
        .collect();
    let wanted = ["hole_chunks", "holes_only", "simple", "status_error", "structured"];
    assert_eq!(whole, wanted);
}

#[test]
fn noise_in_a_server_s_words_ends_in_an_error_or_in_what_was_said() {
    let pool = BufPool::new(10);
    let seeds = seeds();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below.max(1) as u64).unwrap()
    };
    let mut whole = 0;
    for _ in 0..6000 {
        let (_, seed) = &seeds[random(seeds.len())];
        let mut stream = server(seed);
        for _ in 0..=random(4) {
            let at = random(stream.len());
            match random(5) {
                0 => stream.truncate(at),
                1 if at < stream.len() => stream[at] = [0, 1, 7, 0x7f, 0x80, 0xff][random(6)],
                2 if at < stream.len() => stream[at] ^= 1 << random(8),
                3 => {
                    let end = (at + random(40)).min(stream.len());
                    let part = stream[at.min(end)..end].to_vec();
                    stream.extend(part);
                }
                _ => {
                    stream.splice(at..(at + random(9)).min(stream.len()), []);
                }
            }
        }
        whole += usize::from(play(&stream, &pool));
    }
    assert!(whole > 10, "nothing but errors tests nothing: {whole}");
}
