//! HTTP as a source speaks it: the way there, who may go it with which credentials, and one request.
//!
//! Why: servers lie, redirects lead astray, and a credential must not follow them.
//! How: a [`Client`] asks a [`Route`](route::Route) for ranges and judges each answer; the route
//! follows redirects within the address policy, directly or through a proxy; what it shows on the
//! way is in an [`Access`], whose secrets are read when they are needed.
//! Never: gives bytes of an answer whose head was not judged, or connects where the policy forbids.
//! Start at [`Client::get`].

mod access;
mod address;
mod client;
mod direct;
mod reply;
mod route;
mod s3;
mod secret;
mod secured;
mod socket;
mod tls;

pub use access::{Access, Basic, S3Access};
pub(super) use address::Guarded;
pub use address::{AddressClass, AddressPolicy, AddressRefused, judge as judge_address};
pub use client::parse_content_range;
pub(super) use client::{Answer, Client};
pub use secret::{AccessError, Secret, Trust};
