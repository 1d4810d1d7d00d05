//! The only layer that sees both ends.
