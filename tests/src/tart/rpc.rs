//! The guest agent's protocol, from the contract's field numbers: no package, service `Agent`.

use std::collections::HashMap;

use prost::{Message, Oneof};

pub(crate) const EXEC: &str = "/Agent/Exec";
pub(crate) const RESOLVE_IP: &str = "/Agent/ResolveIP";

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ExecRequest {
    #[prost(oneof = "Request", tags = "1, 2, 3")]
    pub(crate) kind: Option<Request>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum Request {
    #[prost(message, tag = "1")]
    Command(Command),
    #[prost(message, tag = "2")]
    StandardInput(Chunk),
    #[prost(message, tag = "3")]
    TerminalResize(TerminalSize),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Command {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, repeated, tag = "2")]
    pub(crate) args: Vec<String>,
    #[prost(bool, tag = "3")]
    pub(crate) interactive: bool,
    #[prost(bool, tag = "4")]
    pub(crate) tty: bool,
    #[prost(message, optional, tag = "5")]
    pub(crate) terminal_size: Option<TerminalSize>,
    #[prost(bool, tag = "6")]
    pub(crate) detach: bool,
    #[prost(map = "string, string", tag = "7")]
    pub(crate) env: HashMap<String, String>,
    #[prost(string, tag = "8")]
    pub(crate) workdir: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct TerminalSize {
    #[prost(uint32, tag = "1")]
    pub(crate) rows: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) cols: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Chunk {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ExecResponse {
    #[prost(oneof = "Response", tags = "1, 2, 3")]
    pub(crate) kind: Option<Response>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum Response {
    #[prost(message, tag = "1")]
    Exit(Exit),
    #[prost(message, tag = "2")]
    StandardOutput(Chunk),
    #[prost(message, tag = "3")]
    StandardError(Chunk),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Exit {
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ResolveIpRequest {}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ResolveIpResponse {
    #[prost(string, tag = "1")]
    pub(crate) ip: String,
}

impl From<Request> for ExecRequest {
    fn from(kind: Request) -> ExecRequest {
        ExecRequest { kind: Some(kind) }
    }
}

impl From<Response> for ExecResponse {
    fn from(kind: Response) -> ExecResponse {
        ExecResponse { kind: Some(kind) }
    }
}
