//! Any bytes in Redis are a checkpoint or an error, and a checkpoint is written as it was read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prefetchd::checkpoint::Checkpoint;

fuzz_target!(|data: &[u8]| {
    if let Ok(checkpoint) = Checkpoint::from_json(data) {
        let written = checkpoint.to_json();
        let again = Checkpoint::from_json(&written).expect("it is one of ours");
        assert_eq!(again.to_json(), written);
    }
});
