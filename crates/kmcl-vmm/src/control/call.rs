//! The requests there are: from a method, a path and a body to a call of [`Controlled`], and from what
//! that gives to an answer.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::api::{
    ControlError, Controlled, ErrorKind, RemoveDiskRequest, SaveRequest, ShutdownRequest,
};
use super::http::Answer;
use crate::config::DiskConfig;

/// What every path begins with. The number changes when a request that worked no longer would.
pub const API_ROOT: &str = "/api/v1/";

/// The requests there are: HTTP's method, and the name that stands behind [`API_ROOT`].
pub const REQUESTS: [(&str, &str); 9] = [
    ("GET", "vm.info"),
    ("GET", "vm.counters"),
    ("PUT", "vm.pause"),
    ("PUT", "vm.resume"),
    ("PUT", "vm.save"),
    ("PUT", "vm.shutdown"),
    ("PUT", "vm.reboot"),
    ("PUT", "vm.add-disk"),
    ("PUT", "vm.remove-disk"),
];

/// A request that is in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Call {
    Info,
    Counters,
    Pause,
    Resume,
    Save(SaveRequest),
    Shutdown(ShutdownRequest),
    Reboot(ShutdownRequest),
    AddDisk(DiskConfig),
    RemoveDisk(RemoveDiskRequest),
}

/// The body of a request that takes none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

impl Call {
    /// The call that a request is.
    ///
    /// # Errors
    /// The answer to give instead.
    pub(super) fn of(method: &str, path: &str, body: &[u8]) -> Result<Self, Answer> {
        let known = path.strip_prefix(API_ROOT);
        let known = known.and_then(|name| REQUESTS.iter().find(|(_, known)| *known == name));
        let Some(&(allowed, name)) = known else {
            let what = format!("there is no {path:?}");
            return Err(Answer::error(&ControlError::not_found(what)));
        };
        if method != allowed {
            let what = format!("{name} is asked for with {allowed}, not {method:?}");
            let error = ControlError::new(ErrorKind::Method, what);
            return Err(Answer::error(&error).allowing(allowed));
        }
        Self::named(name, body).map_err(|error| {
            let message = format!("{name}: {}", error.message);
            Answer::error(&ControlError { message, ..error })
        })
    }

    fn named(name: &str, body: &[u8]) -> Result<Self, ControlError> {
        let plain = |call| optional(body).map(|_: Option<Nothing>| call);
        match name {
            "vm.info" => plain(Self::Info),
            "vm.counters" => plain(Self::Counters),
            "vm.pause" => plain(Self::Pause),
            "vm.resume" => plain(Self::Resume),
            "vm.save" => json(body).map(Self::Save),
            "vm.shutdown" => optional(body).map(|how| Self::Shutdown(how.unwrap_or_default())),
            "vm.reboot" => optional(body).map(|how| Self::Reboot(how.unwrap_or_default())),
            "vm.add-disk" => json(body).map(Self::AddDisk),
            "vm.remove-disk" => json(body).map(Self::RemoveDisk),
            _ => Err(ControlError::not_found("there is no such request")),
        }
    }

    /// Whether it changes nothing, and so waits for no change.
    pub(super) fn is_question(&self) -> bool {
        matches!(self, Self::Info | Self::Counters)
    }

    /// Makes the call.
    pub(super) fn perform(self, vm: &dyn Controlled) -> Answer {
        let done = |result: Result<(), ControlError>| result.map(|()| Answer::done());
        let result = match self {
            Self::Info => vm.info().map(|info| Answer::with(&info)),
            Self::Counters => vm.counters().map(|counters| Answer::with(&counters)),
            Self::Pause => done(vm.pause()),
            Self::Resume => done(vm.resume()),
            Self::Save(request) => vm.save(request).map(|saved| Answer::with(&saved)),
            Self::Shutdown(request) => done(vm.shutdown(request)),
            Self::Reboot(request) => done(vm.reboot(request)),
            Self::AddDisk(disk) => vm.add_disk(disk).map(|address| Answer::with(&address)),
            Self::RemoveDisk(request) => done(vm.remove_disk(request)),
        };
        result.unwrap_or_else(|error| Answer::error(&error))
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ControlError> {
    if body.trim_ascii().is_empty() {
        return Err(ControlError::invalid("a body is needed, and there is none"));
    }
    serde_json::from_slice(body).map_err(|error| ControlError::invalid(error.to_string()))
}

/// A body that may be left out.
fn optional<T: DeserializeOwned>(body: &[u8]) -> Result<Option<T>, ControlError> {
    if body.trim_ascii().is_empty() { Ok(None) } else { json(body).map(Some) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(answer: &Answer) -> String {
        let bytes = answer.to_bytes(true, false);
        String::from_utf8(bytes).unwrap().split(' ').nth(1).unwrap().to_owned()
    }

    /// The table and the match are one list.
    #[test]
    fn every_request_is_a_call() {
        for (method, name) in REQUESTS {
            let path = format!("{API_ROOT}{name}");
            let bodies = ["", "{}", r#"{"destination":"/x"}"#, r#"{"path":"/x"}"#, r#"{"id":"x"}"#];
            let calls: Vec<_> =
                bodies.iter().filter_map(|b| Call::of(method, &path, b.as_bytes()).ok()).collect();
            assert!(!calls.is_empty(), "{name}");
            for call in calls {
                assert_eq!(call.is_question(), method == "GET", "{name}");
            }
        }
    }

    #[test]
    fn what_is_no_call_is_answered() {
        let deep = format!("{{\"destination\":{}", "[".repeat(10_000));
        for (method, path, body, expected) in [
            ("GET", "/", "", "404"),
            ("GET", "/api/v1/", "", "404"),
            ("GET", "/api/v2/vm.info", "", "404"),
            ("GET", "/api/v1/vm.info?a", "", "404"),
            ("GET", "/api/v1/vm.pause", "", "405"),
            ("PUT", "/api/v1/vm.info", "", "405"),
            ("put", "/api/v1/vm.pause", "", "405"),
            ("PUT", "/api/v1/vm.pause", r#"{"a":1}"#, "400"),
            ("PUT", "/api/v1/vm.save", "", "400"),
            ("PUT", "/api/v1/vm.save", "{}", "400"),
            ("PUT", "/api/v1/vm.save", deep.as_str(), "400"),
            ("PUT", "/api/v1/vm.save", r#"{"destination":"/x","compression":"gzip"}"#, "400"),
            ("PUT", "/api/v1/vm.shutdown", r#"{"force":1}"#, "400"),
            ("PUT", "/api/v1/vm.add-disk", r#"{"path":"/x","controller":256}"#, "400"),
            ("PUT", "/api/v1/vm.remove-disk", r#"{"id":"a"} {"id":"b"}"#, "400"),
            ("PUT", "/api/v1/vm.remove-disk", "\u{0}", "400"),
        ] {
            let answer = Call::of(method, path, body.as_bytes()).unwrap_err();
            let start: String = body.chars().take(60).collect();
            assert_eq!(status(&answer), expected, "{method} {path} {start}");
        }
    }
}
