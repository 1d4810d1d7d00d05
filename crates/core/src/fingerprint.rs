//! FNV-1a, 64 bits: a hash that, unlike the standard library's, is the same in every version and on every machine.

#[derive(Debug, Clone, Copy)]
pub struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Fingerprint(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    /// Each part is hashed with its length, so that ("ab", "c") differs from ("a", "bc").
    pub fn add(&mut self, part: &[u8]) {
        for byte in (part.len() as u64).to_le_bytes().iter().chain(part) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub fn get(self) -> u64 {
        self.0
    }
}
