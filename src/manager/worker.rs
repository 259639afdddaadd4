//! The real workers of this node: the store and the transfer behind [`super::Backend`].
