//! A trace of what a guest reads first, as somebody gives it, and as a record has it.
#![no_main]

use bedplate::image::{MAX_TRACE_RANGES, Trace};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 1 << 40;

fn ranges(trace: &Trace, size_bytes: u64) -> Vec<(u64, u64)> {
    trace.ranges(size_bytes).map(|(at, len_bytes)| (at.0, len_bytes)).collect()
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(stored) = serde_json::from_slice::<Trace>(bytes) {
        assert!(stored.len() <= MAX_TRACE_RANGES);
    }
    match Trace::parse(bytes) {
        Ok(trace) => {
            assert!(trace.len() <= MAX_TRACE_RANGES);
            let all = ranges(&trace, SIZE);
            assert!(all.iter().all(|(at, len)| *len > 0 && at + len <= SIZE), "inside the disk");
            let stored = serde_json::to_string(&trace).expect("a record is JSON");
            assert_eq!(serde_json::from_str::<Trace>(&stored).expect("its own record"), trace);
            let file = serde_json::to_vec(&trace.to_file()).expect("a file is JSON");
            if let Ok(again) = Trace::parse(&file) {
                let size = trace.size_bytes().unwrap_or(SIZE);
                assert_eq!(ranges(&again, size), ranges(&trace, size));
            }
        }
        Err(error) => drop(error.to_string()),
    }
});
