//! The negotiation: from a fresh connection to an export of known size.
//!
//! Why: what the server can do decides how the export is read: holes are told only with structured
//! replies.
//! How: fixed newstyle; STRUCTURED_REPLY, then the context `base:allocation`, then GO. What is refused of
//! the first two is done without.
//! Never: sends a byte before the other side has greeted as a server of NBD does: a path or an address
//! may lead anywhere.
//! Start at [`open`].

use tokio::io::{AsyncRead, AsyncWrite};

use super::fault::{NbdFault, said};
use super::link::Link;
use super::wire::{
    BASE_ALLOCATION, FIXED_NEWSTYLE, INFO_BLOCK_SIZE, INFO_EXPORT, INIT_MAGIC, NO_ZEROES,
    OLDSTYLE_MAGIC, OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_ERR_POLICY, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_UNSUP,
    REP_ERROR_BIT, REP_INFO, REP_META_CONTEXT, be16, be32, be64, option, text,
};

/// Longest data of a reply to an option: a few numbers and a string.
const MAX_REPLY_BYTES: u32 = 2 * 4096;
/// Replies to one option.
const MAX_REPLIES: usize = 64;
/// Requests are at least as large as a server wants, up to this.
const MAX_MIN_BLOCK: u32 = 64 * 1024;
/// Requests need not be smaller than this.
const MIN_MAX_BLOCK: u32 = 4096;
/// What a server must take that does not say what it takes.
const DEFAULT_MAX_BLOCK: u32 = 32 << 20;

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its length in bytes.
    pub size: u64,
    /// Replies come in chunks.
    pub structured: bool,
    /// Number of the context `base:allocation`, if holes can be asked for.
    pub holes: Option<u32>,
    /// Requests begin and end at multiples of this, a power of two.
    pub min_block: u32,
    /// Requests are at most as long.
    pub max_block: u32,
}

/// One reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

/// Negotiates the export `name`.
pub(super) async fn open<S: AsyncRead + AsyncWrite>(
    link: &mut Link<S>,
    name: &str,
) -> Result<Export, NbdFault> {
    greet(link).await?;
    let structured = ask_structured(link).await?;
    let holes = if structured { ask_for_holes(link, name).await? } else { None };
    go(link, name, structured, holes).await
}

async fn greet<S: AsyncRead + AsyncWrite>(link: &mut Link<S>) -> Result<(), NbdFault> {
    let found = be64(&link.array().await?);
    if found != INIT_MAGIC {
        return Err(NbdFault::NoServer { found });
    }
    match be64(&link.array().await?) {
        OPTION_MAGIC => {}
        OLDSTYLE_MAGIC => return Err(NbdFault::TooOld { what: "it has the old style" }),
        found => return Err(NbdFault::Protocol { what: "no magic of options", found }),
    }
    let flags = be16(&link.array().await?);
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(NbdFault::TooOld { what: "its newstyle is not the fixed one" });
    }
    let flags = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    link.send(&flags.to_be_bytes()).await
}

/// The next reply to option `number`.
async fn reply<S: AsyncRead + AsyncWrite>(
    link: &mut Link<S>,
    number: u32,
) -> Result<Reply, NbdFault> {
    let magic = be64(&link.array().await?);
    if magic != OPTION_REPLY_MAGIC {
        return Err(NbdFault::Protocol { what: "no magic of a reply to an option", found: magic });
    }
    let (to, kind) = (be32(&link.array().await?), be32(&link.array().await?));
    if to != number {
        let found = u64::from(to);
        return Err(NbdFault::Protocol { what: "a reply to another option", found });
    }
    let len = be32(&link.array().await?);
    if len > MAX_REPLY_BYTES {
        let found = u64::from(len);
        return Err(NbdFault::Protocol { what: "a reply to an option is too long", found });
    }
    let data = link.bytes(usize::try_from(len).unwrap_or(0)).await?;
    if kind == REP_ERR_TLS_REQD {
        return Err(NbdFault::WantsTls);
    }
    Ok(Reply { kind, data })
}

async fn ask_structured<S: AsyncRead + AsyncWrite>(link: &mut Link<S>) -> Result<bool, NbdFault> {
    link.send(&option(OPT_STRUCTURED_REPLY, &[])).await?;
    match reply(link, OPT_STRUCTURED_REPLY).await?.kind {
        REP_ACK => Ok(true),
        kind if kind & REP_ERROR_BIT != 0 => Ok(false),
        kind => Err(unexpected(kind)),
    }
}

fn unexpected(kind: u32) -> NbdFault {
    NbdFault::Protocol { what: "a reply that the option does not have", found: u64::from(kind) }
}

fn too_many() -> NbdFault {
    NbdFault::Protocol { what: "replies to one option without an end", found: MAX_REPLIES as u64 }
}

async fn ask_for_holes<S: AsyncRead + AsyncWrite>(
    link: &mut Link<S>,
    name: &str,
) -> Result<Option<u32>, NbdFault> {
    let one = 1u32.to_be_bytes();
    let data = [&text(name.as_bytes())[..], &one, &text(BASE_ALLOCATION)].concat();
    link.send(&option(OPT_SET_META_CONTEXT, &data)).await?;
    let mut found = None;
    for _ in 0..MAX_REPLIES {
        let Reply { kind, data } = reply(link, OPT_SET_META_CONTEXT).await?;
        match (kind, data.split_first_chunk::<4>()) {
            (REP_ACK, _) => return Ok(found),
            (REP_META_CONTEXT, Some((id, name))) if name == BASE_ALLOCATION => {
                found = Some(be32(id));
            }
            (REP_META_CONTEXT, Some(_)) => {}
            // Of an export that is not there GO says more.
            (kind, _) if kind & REP_ERROR_BIT != 0 => return Ok(None),
            (kind, _) => return Err(unexpected(kind)),
        }
    }
    Err(too_many())
}

async fn go<S: AsyncRead + AsyncWrite>(
    link: &mut Link<S>,
    name: &str,
    structured: bool,
    holes: Option<u32>,
) -> Result<Export, NbdFault> {
    let wanted = [&1u16.to_be_bytes()[..], &INFO_BLOCK_SIZE.to_be_bytes()].concat();
    let data = [&text(name.as_bytes())[..], &wanted].concat();
    link.send(&option(OPT_GO, &data)).await?;
    let (mut size, mut blocks) = (None, (1, DEFAULT_MAX_BLOCK));
    for _ in 0..MAX_REPLIES {
        let Reply { kind, data } = reply(link, OPT_GO).await?;
        match kind {
            REP_ACK => {
                let missing = || NbdFault::Protocol { what: "the export has no size", found: 0 };
                let size = size.ok_or_else(missing)?;
                let (min_block, max_block) = blocks;
                return Ok(Export { size, structured, holes, min_block, max_block });
            }
            REP_INFO => {
                let Some((about, rest)) = data.split_first_chunk::<2>() else {
                    return Err(NbdFault::Protocol { what: "an empty information", found: 0 });
                };
                match be16(about) {
                    INFO_EXPORT => size = Some(size_of_export(rest)?),
                    INFO_BLOCK_SIZE => blocks = block_sizes(rest)?,
                    _ => {}
                }
            }
            REP_ERR_UNSUP => return Err(NbdFault::TooOld { what: "it has no NBD_OPT_GO" }),
            REP_ERR_UNKNOWN => return Err(NbdFault::NoExport { text: said(&data) }),
            REP_ERR_POLICY => return Err(NbdFault::Refused { code: kind, text: said(&data) }),
            code if code & REP_ERROR_BIT != 0 => {
                return Err(NbdFault::Refused { code, text: said(&data) });
            }
            kind => return Err(unexpected(kind)),
        }
    }
    Err(too_many())
}

fn size_of_export(rest: &[u8]) -> Result<u64, NbdFault> {
    let size = match rest.split_first_chunk::<8>() {
        // The flags are of no use: nothing is written.
        Some((size, flags)) if flags.len() == 2 => be64(size),
        Some(_) | None => {
            let found = rest.len() as u64;
            return Err(NbdFault::Protocol { what: "length of the export's information", found });
        }
    };
    if i64::try_from(size).is_err() {
        return Err(NbdFault::Protocol { what: "size of the export", found: size });
    }
    Ok(size)
}

/// The smallest and the largest request.
fn block_sizes(rest: &[u8]) -> Result<(u32, u32), NbdFault> {
    let wrong = |what, found: u32| Err(NbdFault::Protocol { what, found: u64::from(found) });
    let (Some((min, _)), Some((_, max))) =
        (rest.split_first_chunk::<4>(), rest.split_last_chunk::<4>())
    else {
        return wrong("length of the block sizes", 0);
    };
    let (min, max) = (be32(min), be32(max));
    if rest.len() != 12 || !min.is_power_of_two() || min > MAX_MIN_BLOCK {
        return wrong("smallest block", min);
    }
    // A multiple of the smallest, or no limit.
    let max = max / min * min;
    if max < min.max(MIN_MAX_BLOCK) {
        return wrong("largest block", max);
    }
    Ok((min, max))
}
