//! TryFrom both ways between wire messages and our own types.
