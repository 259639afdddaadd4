//! The data of options, from bytes: pure, total, without I/O or allocation.
//!
//! Why: everything here comes from whoever can open the socket.
//! How: a cursor that takes checked parts off the front; an option is right only if nothing is
//! left over.
//! Never: panics, or trusts a length.
//! Start at [`InfoRequest::parse`] and [`MetaRequest::parse`]; the one payload of a request that is
//! looked at, [`StatusFilter`], is parsed here too.

use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::{U16, U32};

use super::contexts::{Context, Contexts};
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
    /// What SET_META_CONTEXT selects: the contexts that were named exactly.
    pub selected: Contexts,
    /// What LIST_META_CONTEXT lists: these, those of a namespace that was named alone (`base:`),
    /// and all of them if there was no query.
    pub listed: Contexts,
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
        let (mut selected, mut listed) = (Contexts::NONE, Contexts::NONE);
        // Each query takes at least four bytes, so that a lying count ends with the data.
        for _ in 0..count {
            let query = rest.string()?;
            selected = selected.with(Contexts::named(query));
            listed = listed.with(Contexts::matching(query));
        }
        rest.end()?;
        let listed = if count == 0 { Contexts::ALL } else { listed };
        Ok(Self { name, selected, listed })
    }
}

/// The payload of BLOCK_STATUS: a length, and the contexts that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusFilter {
    /// Length of the range in bytes.
    pub len_bytes: u64,
    /// Which contexts are reported.
    pub contexts: Contexts,
}

impl StatusFilter {
    /// The longest payload that can be right, in bytes.
    pub const MAX_BYTES: usize = 8 + 4 * Context::ALL.len();

    /// Parses `payload`, whose contexts have to be among `agreed`.
    ///
    /// # Errors
    /// [`Malformed`] if the length does not fit, no context is named, or one twice, or one that was
    /// not agreed on.
    pub fn parse(payload: &[u8], agreed: Contexts) -> Result<Self, Malformed> {
        let mut rest = Cursor(payload);
        let len_bytes = u64::from(rest.number_u32()?) << 32 | u64::from(rest.number_u32()?);
        let mut contexts = Contexts::NONE;
        while rest.end().is_err() {
            let id = rest.number_u32()?;
            let named = Context::ALL.into_iter().find(|context| context.id() == id);
            match named.filter(|context| agreed.has(*context)) {
                Some(context) if !contexts.has(context) => contexts = contexts.with(context.into()),
                Some(_) => return Err(Malformed("a metadata context is named twice")),
                None => return Err(Malformed("a metadata context that was not selected")),
            }
        }
        if contexts == Contexts::NONE {
            return Err(Malformed("the payload names no metadata context"));
        }
        Ok(Self { len_bytes, contexts })
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
        data.extend_from_slice(b"x\0\0\0\x03");
        for query in ["base:allocationx", "x-other:y", "bedplate:presence "] {
            data.extend_from_slice(&u32::try_from(query.len()).unwrap().to_be_bytes());
            data.extend_from_slice(query.as_bytes());
        }
        let request = MetaRequest::parse(&data).unwrap();
        assert_eq!((request.selected, request.listed), (Contexts::NONE, Contexts::NONE));
    }

    #[test]
    fn a_filter_names_selected_contexts_once_each() {
        let (both, one) = (Contexts::ALL, Contexts::from(Context::Allocation));
        let payload = |ids: &[u32]| {
            let mut bytes = (7u64 << 32).to_be_bytes().to_vec();
            ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_be_bytes()));
            bytes
        };
        let right = StatusFilter { len_bytes: 7 << 32, contexts: one };
        assert_eq!(StatusFilter::parse(&payload(&[1]), both), Ok(right));
        assert_eq!(StatusFilter::parse(&payload(&[2, 1]), both).unwrap().contexts, both);
        for (ids, agreed) in [(&[][..], both), (&[1, 1], both), (&[3], both), (&[2], one)] {
            assert!(StatusFilter::parse(&payload(ids), agreed).is_err(), "{ids:?}");
        }
        let whole = payload(&[1]);
        for cut in 0..whole.len() {
            assert!(StatusFilter::parse(&whole[..cut], both).is_err(), "{cut} bytes");
        }
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
            let _verdict = StatusFilter::parse(&data, Contexts::ALL);
        }
    }
}
