//! The last word on the error stream: how a command ended, as every client reads it. Protocols 4 and 5 carry a
//! Kubernetes `Status` in JSON; the older ones plain text, and nothing for success.

use serde_json::json;

/// How an exec or attach ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Exit(i32),
    Failed(String),
}

impl Outcome {
    /// What is written on the error stream.
    pub(crate) fn text(&self, structured: bool) -> Vec<u8> {
        match structured {
            true => self.json().to_string().into_bytes(),
            false => self.message().unwrap_or_default().into_bytes(),
        }
    }

    fn message(&self) -> Option<String> {
        match self {
            Outcome::Exit(0) => None,
            Outcome::Exit(code) => {
                Some(format!("command terminated with non-zero exit code: exit status {code}"))
            }
            Outcome::Failed(why) => Some(format!("Internal error occurred: {why}")),
        }
    }

    fn json(&self) -> serde_json::Value {
        let message = self.message();
        match self {
            Outcome::Exit(0) => json!({"metadata": {}, "status": "Success"}),
            Outcome::Exit(code) => json!({
                "metadata": {}, "status": "Failure", "message": message, "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Outcome::Failed(_) => json!({
                "metadata": {}, "status": "Failure", "message": message, "reason": "InternalError", "code": 500,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_find_the_exit_code_in_the_cause() {
        let status: serde_json::Value = serde_json::from_slice(&Outcome::Exit(3).text(true)).unwrap();
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        assert_eq!(status["reason"], "NonZeroExitCode");
        let status: serde_json::Value = serde_json::from_slice(&Outcome::Exit(0).text(true)).unwrap();
        assert_eq!(status["status"], "Success");
        assert_eq!(Outcome::Exit(0).text(false), b"");
        assert_eq!(Outcome::Failed("no".into()).text(false), b"Internal error occurred: no");
    }
}
