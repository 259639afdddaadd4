//! The data of options, from bytes: pure, total, without I/O or allocation.
//!
//! Why: everything here comes from whoever can open the socket.
//! How: a cursor that takes checked parts off the front; an option is right only if nothing is
//! left over.
//! Never: panics, or trusts a length.
//! Start at [`InfoRequest::parse`] and [`MetaRequest::parse`].

use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::{U16, U32};

use super::wire::{self, MAX_STRING_BYTES};

/// Why an option's data are refused, in words for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// Data of INFO and GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export that is asked for; empty for the default export.
    pub name: &'a str,
    /// The name is to be told.
    pub wants_name: bool,
    /// The description is to be told.
    pub wants_description: bool,
    /// The block sizes are to be told.
    pub wants_block_size: bool,
}

impl<'a> InfoRequest<'a> {
    /// Parses `data`; information types that are not known here are skipped, as the protocol asks.
    ///
    /// # Errors
    /// [`Malformed`] if a length does not fit or a name is no string.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = Cursor(data);
        let name = rest.string()?;
        let count = rest.number_u16()?;
        let mut request =
            Self { name, wants_name: false, wants_description: false, wants_block_size: false };
        for _ in 0..count {
            match rest.number_u16()? {
                wire::info::NAME => request.wants_name = true,
                wire::info::DESCRIPTION => request.wants_description = true,
                wire::info::BLOCK_SIZE => request.wants_block_size = true,
                _unknown_or_always_sent => {}
            }
        }
        rest.end()?;
        Ok(request)
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// The export that is asked for; empty for the default export.
    pub name: &'a str,
    /// No query was sent at all.
    pub no_queries: bool,
    /// A query named exactly `base:allocation`.
    pub names_allocation: bool,
    /// A query was the wildcard `base:`.
    pub names_base: bool,
}

impl<'a> MetaRequest<'a> {
    /// Parses `data`; queries of other namespaces are ignored, as the protocol asks.
    ///
    /// # Errors
    /// [`Malformed`] if a length does not fit or a string is none.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = Cursor(data);
        let name = rest.string()?;
        let count = rest.number_u32()?;
        let mut request =
            Self { name, no_queries: count == 0, names_allocation: false, names_base: false };
        // Each query takes at least four bytes, so that a lying count ends with the data.
        for _ in 0..count {
            match rest.string()? {
                "base:allocation" => request.names_allocation = true,
                "base:" => request.names_base = true,
                _another_namespace_or_leaf => {}
            }
        }
        rest.end()?;
        Ok(request)
    }
}

/// The data of EXPORT_NAME: all of them are the name.
///
/// # Errors
/// [`Malformed`] if they are no string of the protocol.
pub fn export_name(data: &[u8]) -> Result<&str, Malformed> {
    checked_string(data)
}

/// A string of the protocol: UTF-8, at most 4096 bytes, no NUL.
fn checked_string(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(Malformed("a string has a NUL in it"));
    }
    std::str::from_utf8(bytes).map_err(|_| Malformed("a string is not UTF-8"))
}

/// What is left of an option's data.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    const SHORT: Malformed = Malformed("the option's length is too short for its contents");

    fn number_u16(&mut self) -> Result<u16, Malformed> {
        let (number, rest) = U16::read_from_prefix(self.0).map_err(|_| Self::SHORT)?;
        self.0 = rest;
        Ok(number.get())
    }

    fn number_u32(&mut self) -> Result<u32, Malformed> {
        let (number, rest) = U32::read_from_prefix(self.0).map_err(|_| Self::SHORT)?;
        self.0 = rest;
        Ok(number.get())
    }

    /// A 32-bit length and that many bytes of text.
    fn string(&mut self) -> Result<&'a str, Malformed> {
        let len_bytes = usize::try_from(self.number_u32()?).map_err(|_| Self::SHORT)?;
        let (text, rest) = self.0.split_at_checked(len_bytes).ok_or(Self::SHORT)?;
        self.0 = rest;
        checked_string(text)
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("the option's length is too long")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info(name: &[u8], kinds: &[u16]) -> Vec<u8> {
        let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&u16::try_from(kinds.len()).unwrap().to_be_bytes());
        kinds.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
        data
    }

    #[test]
    fn information_types_are_found_and_unknown_ones_skipped() {
        let data = info(b"debian-12", &[3, 0, 77, 1]);
        let request = InfoRequest::parse(&data).unwrap();
        assert_eq!(request.name, "debian-12");
        assert!(request.wants_block_size && request.wants_name && !request.wants_description);
    }

    #[test]
    fn an_option_with_a_byte_too_few_or_too_many_is_malformed() {
        let data = info(b"a", &[3]);
        for cut in 0..data.len() {
            assert!(InfoRequest::parse(&data[..cut]).is_err(), "{cut} bytes");
        }
        let mut long = data.clone();
        long.push(0);
        assert!(InfoRequest::parse(&long).is_err());
    }

    #[test]
    fn a_count_of_queries_that_lies_ends_with_the_data() {
        let mut data = 0u32.to_be_bytes().to_vec();
        data.extend_from_slice(&u32::MAX.to_be_bytes());
        assert!(MetaRequest::parse(&data).is_err());
    }

    #[test]
    fn only_the_exact_context_name_selects() {
        let mut data = 1u32.to_be_bytes().to_vec();
        data.extend_from_slice(b"x\0\0\0\x02");
        for query in ["base:allocationx", "x-other:y"] {
            data.extend_from_slice(&u32::try_from(query.len()).unwrap().to_be_bytes());
            data.extend_from_slice(query.as_bytes());
        }
        let request = MetaRequest::parse(&data).unwrap();
        assert!(!request.names_allocation && !request.names_base && !request.no_queries);
    }

    #[test]
    fn a_string_has_no_nul_and_is_utf8_and_short() {
        assert_eq!(export_name(b"").unwrap(), "");
        assert!(export_name(b"a\0b").is_err());
        assert!(export_name(b"\xff").is_err());
        assert!(export_name(&[b'a'; MAX_STRING_BYTES]).is_ok());
        assert!(export_name(&[b'a'; MAX_STRING_BYTES + 1]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(data: Vec<u8>) {
            let _verdict = (InfoRequest::parse(&data), MetaRequest::parse(&data));
        }
    }
}
