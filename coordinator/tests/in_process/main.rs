//! A coordinator with expert-nodes in this process: what it answers ([`exactness`], [`decoder_only`],
//! [`shipped_decoder`], [`generation_config`], [`choices`]) to prompts of all kinds ([`prompts`]) and in mode `guided`
//! ([`guided`]), what it survives ([`failures`]), how it reaches nodes behind sockets ([`lanes`], [`epochs`]), what it
//! refuses ([`limits`]), how sequences share their memory ([`cache_memory`]) and their beginnings
//! ([`shared_prefixes`]), what it replays ([`recorded_routes`]), what predictions cost ([`prediction`]) and what they
//! know of the input ([`reading_input`]), whom it knows ([`clients`]) and what it gives each ([`client_limits`]), and
//! how that looks by gRPC ([`front_door`], [`open_inference`], [`our_faults`]) and by HTTP ([`openai_door`]), and by
//! [all](`every_door`) of them at once. Whole clusters of real nodes are tested in the `tests` crate.

mod cache_memory;
mod choices;
mod client_limits;
mod clients;
mod cors;
mod decoder_only;
mod echo;
mod epochs;
mod every_door;
mod exactness;
mod failures;
mod front_door;
mod generation_config;
mod guided;
mod lanes;
mod limits;
mod noise_predictor;
mod open_inference;
mod open_inference_http;
mod openai_door;
mod our_faults;
mod plain_experts;
mod plain_http;
mod plain_nodes;
mod prediction;
mod prompts;
mod reading_input;
mod recorded_routes;
mod response_format;
mod shared_prefixes;
mod shipped_decoder;
mod small_experts;
mod tools;
