//! Content: hashing it, splitting it into chunks, and packing chunks into frames.
//!
//! A chunk's id is the hash of its plain bytes and of nothing else, so equal content has one id
//! wherever it comes from. This room knows neither files nor volumes.

pub mod file_hash;
pub mod frame;
pub mod split;

use std::fmt;
use std::str::FromStr;

use sha2::Digest as _;

use crate::error::{Error, Result};

/// The hash function of a catalog; it names chunks, files and blocks alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashAlgo {
    /// BLAKE3 with its default output of 32 bytes.
    Blake3,
    /// SHA-256.
    Sha256,
}

impl HashAlgo {
    /// The word for it in settings and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            HashAlgo::Blake3 => "blake3",
            HashAlgo::Sha256 => "sha256",
        }
    }

    /// Hashes bytes that are all at hand.
    pub fn hash(self, bytes: &[u8]) -> Digest {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finish()
    }

    /// Starts hashing a stream.
    pub fn hasher(self) -> Hasher {
        match self {
            HashAlgo::Blake3 => Hasher::Blake3(Box::default()),
            HashAlgo::Sha256 => Hasher::Sha256(sha2::Sha256::new()),
        }
    }
}

impl FromStr for HashAlgo {
    type Err = Error;

    fn from_str(word: &str) -> Result<HashAlgo> {
        match word {
            "blake3" => Ok(HashAlgo::Blake3),
            "sha256" => Ok(HashAlgo::Sha256),
            _ => Err(Error::usage(format!("unknown hash {word:?}: use blake3 or sha256"))),
        }
    }
}

/// A hash being computed.
#[derive(Clone)]
pub enum Hasher {
    /// BLAKE3 (boxed: its state is two KiB).
    Blake3(Box<blake3::Hasher>),
    /// SHA-256.
    Sha256(sha2::Sha256),
}

impl Hasher {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Blake3(it) => {
                it.update(bytes);
            }
            Hasher::Sha256(it) => it.update(bytes),
        }
    }

    /// The hash of all bytes added.
    pub fn finish(self) -> Digest {
        match self {
            Hasher::Blake3(it) => Digest(*it.finalize().as_bytes()),
            Hasher::Sha256(it) => Digest(it.finalize().into()),
        }
    }
}

/// A hash of 32 bytes: the name of a chunk, a block or a file's whole content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

/// The name of a chunk: the hash of its plain bytes.
pub type ChunkId = Digest;

impl Digest {
    /// The digest that `bytes` hold, which must be 32 of them.
    pub fn from_slice(bytes: &[u8]) -> Result<Digest> {
        match bytes.try_into() {
            Ok(array) => Ok(Digest(array)),
            Err(_) => Err(Error::corrupt(format!("a hash of {} bytes instead of 32", bytes.len()))),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest> {
        let mut bytes = [0; 32];
        let lower = !text.bytes().any(|byte| byte.is_ascii_uppercase());
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) if lower => Ok(Digest(bytes)),
            _ => Err(Error::corrupt(format!("not a hash in lower case hex: {text:?}"))),
        }
    }
}

/// A chunk by name and length, in the order of the content it is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// Its name.
    pub id: ChunkId,
    /// Its plain length in bytes.
    pub len: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn digests_come_back(bytes: [u8; 32]) {
            let digest = Digest(bytes);
            prop_assert_eq!(digest.to_string().parse::<Digest>()?, digest);
            prop_assert_eq!(Digest::from_slice(&bytes)?, digest);
        }

        #[test]
        fn any_digest_is_read_or_refused(
            text: String,
            hex in "[0-9a-fA-F]{60,68}",
            bytes: Vec<u8>,
        ) {
            prop_assert!(text.len() == 64 || text.parse::<Digest>().is_err());
            if let Ok(digest) = hex.parse::<Digest>() {
                prop_assert_eq!(digest.to_string(), hex);
            }
            prop_assert_eq!(Digest::from_slice(&bytes).is_ok(), bytes.len() == 32);
        }
    }

    #[test]
    fn every_hash_has_its_word() {
        for algo in [HashAlgo::Blake3, HashAlgo::Sha256] {
            assert_eq!(algo.as_str().parse::<HashAlgo>().unwrap(), algo);
        }
        assert!("md5".parse::<HashAlgo>().is_err());
    }

    #[test]
    fn known_hashes() {
        let cases = [
            (HashAlgo::Blake3, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
            (HashAlgo::Sha256, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ];
        for (algo, empty) in cases {
            assert_eq!(algo.hash(b"").to_string(), empty);
            assert_eq!(empty.parse::<Digest>().unwrap(), algo.hash(b""));
        }
        assert!(
            "AF1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
                .parse::<Digest>()
                .is_err()
        );
    }
}
