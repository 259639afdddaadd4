//! `bedplate node`: drills of failure and return.
//!
//! Why: who runs replicas wants to see what a failing node does to them, before one fails.
//! Never: waits; `bedplate events` shows what comes of it.

use serde_json::json;

use super::args::Global;
use super::args_health::{NodeArgs, NodeCommand};
use super::exit::CliError;
use super::output::Output;
use crate::control::client::Client;
use crate::control::types_health::Node;

pub(super) async fn run(args: &NodeArgs, global: &Global, output: &Output) -> Result<(), CliError> {
    let client = Client::new(&global.socket());
    let node: Node = match args.command {
        NodeCommand::Get => client.get("/v1/node").await?,
        NodeCommand::Fail => client.post("/v1/node/fail", &json!({})).await?,
        NodeCommand::Return => client.post("/v1/node/return", &json!({})).await?,
    };
    if output.json {
        return output.object(&node);
    }
    output.line(&node.state)
}
