//! The stages that a reply tells of, over many replies.

use crate::report::{Report, Row};

/// In the order of their first coming.
#[derive(Default)]
pub(crate) struct Stages(Vec<(String, Vec<f64>)>);

// === impl Stages ===

impl Stages {
    /// Takes one reply's stages, in milliseconds.
    pub(crate) fn add<'a>(&mut self, stages: impl Iterator<Item = (&'a str, f64)>) {
        for (stage, duration_ms) in stages {
            match self.0.iter_mut().find(|(name, _)| name == stage) {
                Some((_, samples)) => samples.push(duration_ms),
                None => self.0.push((stage.to_owned(), vec![duration_ms])),
            }
        }
    }

    /// A row for each, below that of what they are stages of.
    pub(crate) fn report(self, report: &mut Report) {
        report
            .rows
            .extend(self.0.into_iter().map(|(stage, samples)| {
                let mut row = Row::new(format!("    stage {stage}"), "ms", samples);
                row.is_part = true;
                row
            }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_keep_their_order_and_gather() {
        let mut stages = Stages::default();
        stages.add([("shell", 1.0), ("restore", 2.0)].into_iter());
        stages.add([("spawn", 9.0), ("restore", 4.0)].into_iter());
        let expected = [
            ("shell".to_owned(), vec![1.0]),
            ("restore".to_owned(), vec![2.0, 4.0]),
            ("spawn".to_owned(), vec![9.0]),
        ];
        assert_eq!(stages.0, expected);
    }
}
