//! The text of a generated answer, token by token; and the thread that makes it where a device computes: while the device
//! is in the next step, text is made of the tokens of this one and handed to the callers. Only whether a stop text ends an
//! answer must be known before the next step, so answers that have some are not written there.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use sida_model::{ModelError, Tokenizer};
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    answer::{
        catch_panic::catch_panic,
        detokenize::Detokenizer,
        output::{FinishReason, Token},
        request_error::RequestError,
        stop_text::StopTexts,
    },
    measures::statistics::Statistics,
};

/// Steps whose text is not made yet, before the scheduler waits.
const STEPS_MAX: usize = 8;

/// The text of one answer so far.
pub(crate) struct AnswerText {
    detokenizer: Detokenizer,
    stops: StopTexts,
}

impl AnswerText {
    /// Nothing yet. It ends before one of these texts.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { detokenizer: Detokenizer::default(), stops: StopTexts::new(stops) }
    }

    /// Adds a token, which is the last one for a reason or none. Returns the text that may be streamed, and why the answer
    /// ends, which is by a stop text only where it `may_stop`.
    pub(crate) fn add(
        &mut self,
        id: u32,
        last: Option<FinishReason>,
        may_stop: bool,
        tokenizer: &Tokenizer,
    ) -> Result<(String, Option<FinishReason>), ModelError> {
        let decode = |ids: &[u32]| tokenizer.decode(ids);
        let added = self.detokenizer.push(id, decode)?;
        let released = self.stops.push(added, may_stop);
        if released.stopped {
            return Ok((released.text, Some(FinishReason::Stop)));
        }
        let mut text = released.text;
        if last.is_some() {
            let rest = self.stops.push(self.detokenizer.finish(decode)?, may_stop);
            text += &rest.text;
            if rest.stopped {
                return Ok((text, Some(FinishReason::Stop)));
            }
            text += &self.stops.finish();
        }
        Ok((text, last))
    }
}

/// A token that is to be written into an answer without stop texts.
pub(crate) struct TokenText {
    /// The answer.
    pub(crate) text: Arc<Mutex<AnswerText>>,
    /// Without its text.
    pub(crate) token: Token,
    pub(crate) reply: UnboundedSender<Result<Token, RequestError>>,
}

impl TokenText {
    /// Writes it, and tells the caller, who may have gone, or why it cannot be written.
    fn write(self, tokenizer: &Tokenizer) -> Result<(), RequestError> {
        let Self { text, token, reply } = self;
        let last = token.finish.as_ref().map(|finish| finish.reason);
        match catch_panic(|| Ok(text.lock().add(token.id, last, false, tokenizer)?)) {
            Ok((text, _)) => {
                drop(reply.send(Ok(Token { text, ..token })));
                Ok(())
            }
            Err(error) => {
                drop(reply.send(Err(error.clone())));
                Err(error)
            }
        }
    }
}

/// The thread that writes.
pub(crate) struct TextThread {
    steps: Receiver<Vec<TokenText>>,
    tokenizer: Arc<Tokenizer>,
    statistics: Arc<Statistics>,
}

/// The thread, and where it takes the tokens of a step from.
pub(crate) fn text_thread(
    tokenizer: Arc<Tokenizer>,
    statistics: Arc<Statistics>,
) -> (Sender<Vec<TokenText>>, TextThread) {
    let (sender, steps) = bounded(STEPS_MAX);
    (sender, TextThread { steps, tokenizer, statistics })
}

impl TextThread {
    /// Writes until the scheduler has ended.
    pub(crate) fn run(self) {
        for token in self.steps.iter().flatten() {
            if let Err(error) = token.write(&self.tokenizer) {
                self.statistics.outcomes.failed(&error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, thread};

    use sida_model::ModelConfig;
    use tokio::sync::mpsc;

    use super::*;
    use crate::answer::{output::Finish, routing_mode::RoutingMode, trace::Trace};

    #[test]
    fn another_thread_writes_the_same_text() {
        // Would break: on a device, tokens of an answer change places, lose their text, or end without what was held back.
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/switch-tiny-64");
        let tokenizer =
            Arc::new(Tokenizer::open(&model, &ModelConfig::open(&model).expect("config")).expect("tokenizer"));
        let answers: Vec<Vec<u32>> = ["a gorgeous , witty movie", "naïve café — déjà vu", "x"]
            .map(|text| tokenizer.encode(text).expect("tokens"))
            .into();
        let (steps, thread) = text_thread(tokenizer.clone(), Arc::default());
        let thread = thread::spawn(|| thread.run());
        let (replies, mut received): (Vec<_>, Vec<_>) = answers.iter().map(|_| mpsc::unbounded_channel()).unzip();
        let texts: Vec<_> = answers.iter().map(|_| Arc::new(Mutex::new(AnswerText::new(Vec::new())))).collect();
        for step in 0..answers.iter().map(Vec::len).max().expect("answers") {
            let token = |at: usize| {
                let finish = || Finish {
                    reason: FinishReason::End,
                    prompt_tokens: 1,
                    generated_tokens: step + 1,
                    trace: Trace::new(RoutingMode::Exact, 1, 1),
                };
                let token = Token {
                    text: String::new(),
                    id: *answers[at].get(step)?,
                    choice: 0,
                    logprobs: None,
                    finish: (step + 1 == answers[at].len()).then(finish),
                };
                Some(TokenText { text: texts[at].clone(), token, reply: replies[at].clone() })
            };
            steps.send((0..answers.len()).filter_map(token).collect()).expect("it runs");
        }
        drop((steps, replies));
        thread.join().expect("it ends with the scheduler");
        for (ids, received) in answers.iter().zip(&mut received) {
            let tokens: Vec<Token> =
                std::iter::from_fn(|| received.blocking_recv()).map(|token| token.expect("written")).collect();
            assert_eq!(tokens.iter().map(|token| token.id).collect::<Vec<_>>(), *ids);
            let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
            assert_eq!(text, tokenizer.decode(ids).expect("text"));
            assert!(tokens.iter().rposition(|token| token.finish.is_some()) == Some(tokens.len() - 1));
        }
    }
}
