//! S: SQL.
