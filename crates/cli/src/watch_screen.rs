//! A screen of its own for what is shown again and again, as `top` has one: what was on the terminal before comes back
//! at the end. Used by `status --watch`.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use crossterm::{
    cursor,
    event::{self, Event, KeyCode, KeyEvent, KeyModifiers},
    execute, queue,
    style::Print,
    terminal::{self, ClearType},
};

/// The screen. The terminal is as it was when this is dropped, by a panic, too.
pub(crate) struct WatchScreen {
    over: bool,
}

impl WatchScreen {
    /// Takes the terminal.
    pub(crate) fn open() -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        let screen = Self { over: false };
        execute!(io::stdout(), terminal::EnterAlternateScreen, terminal::DisableLineWrap, cursor::Hide)?;
        Ok(screen)
    }

    /// Shows `text`, as much as fits, for `time` or until somebody wants to end.
    pub(crate) async fn show(mut self, text: &str, time: Duration) -> io::Result<Self> {
        let text = text.to_owned();
        // Keys are waited for on a thread that may block.
        let shown = tokio::task::spawn_blocking(move || {
            draw(&text)?;
            let until = Instant::now() + time;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                if event::poll(left)? {
                    match event::read()? {
                        Event::Key(key) if ends(key) => self.over = true,
                        Event::Resize(..) => draw(&text)?,
                        _ => continue,
                    }
                }
                if self.over {
                    break;
                }
            }
            Ok(self)
        });
        shown.await.map_err(io::Error::other)?
    }

    /// How wide it is.
    pub(crate) fn columns(&self) -> usize {
        size().0
    }

    /// Whether somebody wanted to end.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }
}

impl Drop for WatchScreen {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = execute!(io::stdout(), cursor::Show, terminal::EnableLineWrap, terminal::LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}

fn ends(key: KeyEvent) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) || (control && key.code == KeyCode::Char('c'))
}

/// Columns and rows. A terminal that does not know its size has that of the first ones.
fn size() -> (usize, usize) {
    match terminal::size() {
        Ok((columns, rows)) if columns > 0 && rows > 0 => (columns.into(), rows.into()),
        _ => (80, 24),
    }
}

/// Line by line over what was there, so that nothing flickers.
fn draw(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let (_, rows) = size();
    queue!(out, cursor::MoveTo(0, 0))?;
    for line in text.lines().take(rows.saturating_sub(1)) {
        queue!(out, Print(line), terminal::Clear(ClearType::UntilNewLine), cursor::MoveToNextLine(1))?;
    }
    queue!(out, terminal::Clear(ClearType::FromCursorDown))?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_and_control_c_end_it() {
        // Broken: in raw mode Ctrl-C is a key like others, and the screen could not be left.
        let key = |code, modifiers| ends(KeyEvent::new(code, modifiers));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(key(KeyCode::Esc, KeyModifiers::NONE));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE));
    }
}
