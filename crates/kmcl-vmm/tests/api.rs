//! Holds `docs/api.yaml` against the program: its paths and methods, its bodies in both directions, its errors.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]
#![expect(clippy::indexing_slicing, reason = "of JSON, where it gives null")]

mod control_vm;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use control_vm::NotedVm;
use kmcl_vmm::config::{Cache, DiskConfig, OnReset, SynicMode};
use kmcl_vmm::control::{
    API_ROOT, Compression, Control, ControlError, Controlled, Counters, ErrorKind, HeartbeatState,
    MAX_BODY_BYTES, MAX_FIELDS, MAX_HEAD_BYTES, REQUEST_PATIENCE, REQUESTS, RemoveDiskRequest,
    SaveRequest, ShutdownRequest, State,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The description, as text and as a value.
fn description() -> (String, Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/api.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let value = serde_saphyr::from_str(&text).unwrap();
    (text, value)
}

/// What `at` points to in the description, through `$ref`s.
fn resolve<'a>(api: &'a Value, mut at: &'a Value) -> &'a Value {
    while let Some(reference) = at.get("$ref") {
        let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
        at = api.pointer(pointer).unwrap_or_else(|| panic!("nothing is at {reference}"));
    }
    at
}

fn schema<'a>(api: &'a Value, name: &str) -> &'a Value {
    api.pointer(&format!("/components/schemas/{name}")).unwrap_or_else(|| panic!("no {name}"))
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect()
}

fn strings(value: &Value) -> BTreeSet<&str> {
    value.as_array().into_iter().flatten().map(|one| one.as_str().unwrap()).collect()
}

/// Where a value is not as its schema says. A property that the schema does not name counts too.
fn differences(api: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let schema = resolve(api, schema);
    let is_type = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => {
            let most = schema["maximum"].as_u64().unwrap_or(u64::MAX);
            schema["minimum"] == 0 && value.as_u64().is_some_and(|number| number <= most)
        }
        other => panic!("{at}: a type {other:?}"),
    };
    if !is_type {
        found.push(format!("{at}: {value} is not {}", schema["type"]));
    }
    if schema.get("enum").is_some_and(|values| !values.as_array().unwrap().contains(value)) {
        found.push(format!("{at}: {value} is not one of {}", schema["enum"]));
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        differences(api, &schema["items"], item, &format!("{at}[{index}]"), found);
    }
    let count = value.as_array().map_or(0, Vec::len) as u64;
    if schema["minItems"].as_u64().unwrap_or(0) > count
        || schema["maxItems"].as_u64().unwrap_or(u64::MAX) < count
    {
        found.push(format!("{at}: {count} items"));
    }
    for missing in strings(&schema["required"]).difference(&keys(value)) {
        found.push(format!("{at}: no {missing}"));
    }
    for (key, property) in value.as_object().into_iter().flatten() {
        let at = format!("{at}.{key}");
        let others = schema.get("additionalProperties").filter(|others| others.is_object());
        match schema["properties"].get(key).or(others) {
            Some(schema) => differences(api, schema, property, &at, found),
            None => found.push(format!("{at} is not described")),
        }
    }
}

fn assert_described(api: &Value, schema: &Value, value: &Value, what: &str) {
    let mut found = Vec::new();
    differences(api, schema, value, what, &mut found);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Holds a struct's schema against it: `full`, in which nothing is left out, has each property and no other;
/// without a property it is read exactly if the schema does not require it; with one more, exactly if the
/// schema does not close the list.
fn hold<T: Debug + DeserializeOwned + PartialEq + Serialize>(api: &Value, name: &str, full: &T) {
    let schema = schema(api, name);
    let full = serde_json::to_value(full).unwrap();
    assert_described(api, schema, &full, name);
    assert_eq!(keys(&full), keys(&schema["properties"]), "{name}: a property is never there");
    let reads = |value: &Value| serde_json::from_value::<T>(value.clone()).is_ok();
    assert!(reads(&full), "{name}: {full}");
    for key in keys(&full) {
        let mut less = full.clone();
        less.as_object_mut().unwrap().remove(key);
        let required = strings(&schema["required"]).contains(key);
        assert_eq!(reads(&less), !required, "{name} without {key}");
        if let Some(default) = resolve(api, &schema["properties"][key]).get("default") {
            let read: T = serde_json::from_value(less.clone()).unwrap();
            less[key] = default.clone();
            let expected: T = serde_json::from_value(less).unwrap();
            assert_eq!(read, expected, "{name}: the default of {key}");
        }
        if let Some(most) = schema["properties"][key]["maximum"].as_u64() {
            for (value, expected) in [(most, true), (most + 1, false)] {
                let mut other = full.clone();
                other[key] = json!(value);
                assert_eq!(reads(&other), expected, "{name} with {key} {value}");
            }
        }
    }
    let mut more = full.clone();
    more["nobody_knows_this"] = json!(1);
    let closed = schema["additionalProperties"] == false;
    assert_eq!(reads(&more), !closed, "{name} with one property more");
}

/// Holds an enumeration against its type, which lists its values when it is given another.
fn hold_enumeration<T: Debug + DeserializeOwned>(api: &Value, name: &str) {
    let error = serde_json::from_str::<T>("\"?\"").unwrap_err().to_string();
    let (_, expected) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
    let known: BTreeSet<_> = expected.split('`').skip(1).step_by(2).collect();
    assert_eq!(strings(&schema(api, name)["enum"]), known, "{name}");
}

fn sample<T: DeserializeOwned>(text: &str) -> T {
    serde_json::from_str(text).unwrap()
}

#[test]
fn schemas_are_those_of_the_program() {
    let (_, api) = description();
    let vm = NotedVm::new();
    let info = vm.info().unwrap();
    let disk: DiskConfig = sample(r#"{"id": "d", "path": "/d", "lun": 2}"#);
    hold(&api, "Heartbeat", &info.heartbeat);
    hold(&api, "Crash", info.last_crash.as_ref().unwrap());
    hold(&api, "Progress", info.progress.as_ref().unwrap());
    hold(&api, "VmConfig", &info.config);
    hold(&api, "Info", &info);
    hold(&api, "DiskConfig", &disk);
    hold(&api, "DiskAddress", &vm.add_disk(disk.clone()).unwrap());
    hold(&api, "RemoveDiskRequest", &sample::<RemoveDiskRequest>(r#"{"id": "d"}"#));
    let save: SaveRequest = sample(r#"{"destination": "/s"}"#);
    hold(&api, "Saved", &vm.save(save.clone()).unwrap());
    hold(&api, "SaveRequest", &save);
    hold(&api, "ShutdownRequest", &ShutdownRequest::default());
    hold(&api, "Error", &ControlError::failed("it did not"));
    let counters = serde_json::to_value(vm.counters().unwrap()).unwrap();
    assert_described(&api, schema(&api, "Counters"), &counters, "Counters");
    let example = schema(&api, "Counters")["example"].clone();
    serde_json::from_value::<Counters>(example).unwrap();

    hold_enumeration::<State>(&api, "State");
    hold_enumeration::<HeartbeatState>(&api, "HeartbeatState");
    hold_enumeration::<SynicMode>(&api, "SynicMode");
    hold_enumeration::<OnReset>(&api, "OnReset");
    hold_enumeration::<Cache>(&api, "Cache");
    hold_enumeration::<Compression>(&api, "Compression");
    hold_enumeration::<ErrorKind>(&api, "ErrorKind");
    let held = [
        "Cache",
        "Compression",
        "Counters",
        "Crash",
        "DiskAddress",
        "DiskConfig",
        "Error",
        "ErrorKind",
        "Heartbeat",
        "HeartbeatState",
        "Info",
        "OnReset",
        "Progress",
        "RemoveDiskRequest",
        "SaveRequest",
        "Saved",
        "ShutdownRequest",
        "State",
        "SynicMode",
        "VmConfig",
    ];
    assert_eq!(keys(&api["components"]["schemas"]), BTreeSet::from(held));
}

#[test]
fn errors_have_the_statuses_that_are_described() {
    let (_, api) = description();
    let described = &schema(&api, "ErrorKind")["x-statuses"];
    let known = ErrorKind::ALL.map(|kind| {
        let name = serde_json::to_value(kind).unwrap();
        (name.as_str().unwrap().to_owned(), json!(kind.status().0))
    });
    assert_eq!(*described, Value::Object(known.into_iter().collect()));
}

/// The numbers that its text names.
#[test]
fn limits_are_those_of_the_program() {
    let (text, _) = description();
    assert_eq!(REQUEST_PATIENCE.as_secs(), 10);
    for said in [
        format!("and at most {MAX_BODY_BYTES} bytes"),
        format!("a body of more than {MAX_BODY_BYTES} bytes"),
        format!("more than {MAX_HEAD_BYTES} bytes before the body, or {MAX_FIELDS} header fields"),
        "not there in full within ten seconds".into(),
    ] {
        assert!(text.contains(&said), "{said:?}");
    }
}

struct Served {
    vm: Arc<NotedVm>,
    path: PathBuf,
    _control: Control,
    _dir: tempfile::TempDir,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let vm = Arc::new(NotedVm::new());
        let control = Control::serve(&path, Arc::clone(&vm) as _).unwrap();
        Self { vm, path, _control: control, _dir: dir }
    }

    /// Makes one request; gives the answer's status, header and body.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String, Value) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = if body.is_empty() { Value::Null } else { sample(body) };
        (status, head.to_owned(), body)
    }
}

/// What is described of an operation's answer of some status; of none, what stands for all others.
fn response<'a>(api: &'a Value, operation: &'a Value, status: u16) -> (&'a Value, bool) {
    let explicit = operation["responses"].get(status.to_string());
    let response = explicit.unwrap_or(&operation["responses"]["default"]);
    (&resolve(api, response)["content"]["application/json"]["schema"], explicit.is_some())
}

#[test]
fn paths_and_methods_are_those_of_the_program() {
    let (_, api) = description();
    let described: BTreeSet<_> = api["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            keys(methods).into_iter().map(move |method| (method, &path[1..]))
        })
        .map(|(method, name)| (method.to_uppercase(), name.to_owned()))
        .collect();
    let known = REQUESTS.map(|(method, name)| (method.to_owned(), name.to_owned()));
    assert_eq!(described, BTreeSet::from(known));
    let url = api["servers"][0]["url"].as_str().unwrap();
    assert_eq!(format!("{url}/"), format!("http://vm{API_ROOT}"));
}

#[test]
fn operations_do_what_is_described() {
    let (_, api) = description();
    let served = Served::new();
    for (method, name) in REQUESTS {
        let operation = &api["paths"][format!("/{name}")][method.to_lowercase()];
        let path = format!("{API_ROOT}{name}");
        let ask = |body: &str| served.ask(method, &path, body);
        let body = &operation["requestBody"]["content"]["application/json"];
        let example = body.get("example").map_or(String::new(), Value::to_string);
        if let Some(schema) = body.get("schema") {
            assert_described(&api, schema, &body["example"], name);
        }
        let check = |(status, head, answer): &(u16, String, Value), asked: &str| {
            let (schema, explicit) = response(&api, operation, *status);
            assert!(explicit || *status >= 400, "{name} {asked}: a status {status}");
            match schema {
                Value::Null => assert_eq!(*answer, Value::Null, "{name} {asked}"),
                schema => {
                    assert_described(&api, schema, answer, name);
                    assert!(head.contains("Content-Type: application/json"), "{name}: {head}");
                }
            }
        };
        // As it is meant to be asked.
        let meant = ask(&example);
        assert!((200..300).contains(&meant.0), "{name} {example}: {meant:?}");
        check(&meant, &example);
        // Without a body, and with one that is none.
        let bare = ask("");
        let needed = operation["requestBody"]["required"] == true;
        assert_eq!(bare.0 == 400, needed, "{name} without a body: {bare:?}");
        check(&bare, "");
        let broken = ask("{");
        assert_eq!(broken.0, 400, "{name}: {broken:?}");
        check(&broken, "{");
        // By another method.
        let other = if method == "GET" { "PUT" } else { "GET" };
        let refused = served.ask(other, &path, "");
        assert_eq!(refused.0, 405, "{name}: {refused:?}");
        assert!(refused.1.contains(&format!("\r\nAllow: {method}")), "{name}: {refused:?}");
        // As the VM may answer.
        for kind in ErrorKind::ALL {
            served.vm.fail_with(Some(ControlError::new(kind, "why")));
            let failed = ask(&example);
            assert_eq!(failed.0, kind.status().0, "{name}");
            check(&failed, &example);
            assert_eq!(failed.2, json!({"kind": kind, "message": "why"}), "{name}");
        }
        served.vm.fail_with(None);
    }
}
