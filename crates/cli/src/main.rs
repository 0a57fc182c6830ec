//! `sida`: the whole cluster in one process, one role of it, or a client of one.
//!
//! In reading order. What can be said on the command line: [`command_line`], [`environment`], [`negative_values`],
//! [`flag_errors`], [`settings_file`], [`arguments`], [`time_span`], [`share`], [`whole_number`], [`otlp_flags`], [`bad_configuration`].
//! What it does: [`commands`]. What the commands share: [`model_dir`], [`model_check`], [`text_file`], [`routes_file`], [`embedded`],
//! [`coordinator_client`], [`node_state`], [`runtime`], [`shutdown`].
//! What a person sees: [`loading_bar`], [`byte_size`], [`plain_table`], [`chart`], [`expert_picture`], [`answer_report`],
//! [`status_table`], [`watch_screen`], [`told`].

mod answer_report;
mod api_key;
mod arguments;
mod bad_configuration;
mod byte_size;
mod chart;
mod cluster_elsewhere;
mod command_line;
mod commands;
mod coordinator_client;
mod embedded;
mod environment;
mod expert_picture;
mod flag_errors;
mod loading_bar;
mod machine_memory;
mod model_check;
mod model_dir;
mod negative_values;
mod node_state;
mod open_files;
mod otlp_flags;
mod plain_table;
mod report_file;
mod routes_file;
mod runtime;
mod settings_file;
mod share;
mod shutdown;
mod status_table;
mod text_file;
mod time_span;
mod told;
mod watch_screen;
mod whole_number;

use std::{env, error::Error, io, process::ExitCode};

use bad_configuration::BadConfiguration;
use mimalloc::MiMalloc;
use sida_coordinator::CoordinatorError;
use sida_model::{ModelError, convert::ConvertError};
use sida_predictor::PredictorError;
use sida_predictor_node::PredictorNodeError;
use sida_rpc::{ClientError, KeyError, tls::TlsError};
use told::{may_be_of_http, may_be_of_tls, told, told_status};

/// Tokenizing is little else than small allocations, by several threads at once.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// `EX_USAGE` of sysexits.h: the command line, the environment or a configuration file is wrong, so that
/// starting again will not help.
pub(crate) const EXIT_BAD_CONFIGURATION: u8 = 64;

fn main() -> ExitCode {
    // To candle, which trains predictors, this machine has one processor: training shares the work out to its own
    // threads, and candle's would spin beside them (docs/decisions/0014).
    // SAFETY: no other thread has been started.
    unsafe { env::set_var("CANDLE_CPU_MASK", "0") };
    // SAFETY: the same.
    unsafe { environment::remove_empty() };
    let command_line = match command_line::parse(env::args_os().collect()) {
        Ok(command_line) => command_line,
        Err(command_line::ParseError::Clap(error)) => {
            // Help and version arrive as errors, too; they go to standard output and are a success once they are there.
            return match error.print() {
                _ if error.use_stderr() => EXIT_BAD_CONFIGURATION.into(),
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => failed(&error.into()),
            };
        }
        Err(command_line::ParseError::Settings(error)) => return failed(&error.into()),
    };
    match command_line.run() {
        Ok(code) => code,
        Err(error) => failed(&error),
    }
}

/// Says what went wrong with every cause on one line, and picks the exit code.
fn failed(error: &anyhow::Error) -> ExitCode {
    let is_unread = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    if error.downcast_ref::<io::Error>().is_some_and(is_unread) {
        // Whoever reads the output, `head` say, has seen enough.
        return ExitCode::SUCCESS;
    }
    match error.downcast_ref::<tonic::Status>() {
        Some(status) => eprintln!("sida: {} ({:?})", told_status(status), status.code()),
        None => eprintln!("sida: {}", told(error)),
    }
    if may_be_of_http(error) {
        eprintln!(
            "      that port does not speak gRPC; a coordinator's that does is 50051 unless --listen names another"
        );
    } else if may_be_of_tls(error) {
        eprintln!("      do both ends speak TLS (https://), does the server want --tls-cert, and is it its gRPC port?");
    }
    if error.chain().any(is_lasting) { EXIT_BAD_CONFIGURATION.into() } else { ExitCode::FAILURE }
}

/// Whether starting again will fail again by this cause: a wrong flag, a wrong or damaged file.
fn is_lasting(cause: &(dyn Error + 'static)) -> bool {
    cause.is::<BadConfiguration>()
        || cause.downcast_ref::<ModelError>().is_some_and(ModelError::is_lasting)
        || cause.downcast_ref::<ConvertError>().is_some_and(ConvertError::is_lasting)
        || cause.downcast_ref::<PredictorError>().is_some_and(PredictorError::is_lasting)
        || cause.downcast_ref::<CoordinatorError>().is_some_and(CoordinatorError::is_lasting)
        || cause.downcast_ref::<PredictorNodeError>().is_some_and(PredictorNodeError::is_lasting)
        || cause.is::<TlsError>()
        || cause.is::<KeyError>()
        || cause.downcast_ref::<tonic::Status>().is_some_and(|status| status.code() == tonic::Code::InvalidArgument)
        || matches!(
            cause.downcast_ref(),
            Some(ClientError::Address { .. } | ClientError::Tls { .. } | ClientError::Key { .. })
        )
}
