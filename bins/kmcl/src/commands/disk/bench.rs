//! `kmcl disk bench`: how many requests and bytes a second, and how long each takes.

use std::time::{Duration, Instant};

use serde::Serialize;
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::{Buffer, Completion, DiskInfo, Request};

use crate::cli::{Bench, Workload};
use crate::connection::Connection;
use crate::exit::{Failure, Result};
use crate::histogram::Histogram;
use crate::image::pattern;
use crate::output::{Output, Report, Table, bytes_per_second, rate};
use crate::progress::{Length, Progress};
use crate::size::Size;

/// What was measured.
#[derive(Serialize)]
struct Measured {
    workload: &'static str,
    block_size: u32,
    depth: u16,
    seconds: f64,
    requests: u64,
    bytes: u64,
    requests_per_second: f64,
    bytes_per_second: u64,
    latency_us: Latency,
    #[serde(skip)]
    elapsed: Duration,
}

/// Microseconds from submission to completion.
#[derive(Serialize)]
struct Latency {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    p99_9: f64,
    max: f64,
}

impl Latency {
    fn of(histogram: &Histogram) -> Self {
        let us = |latency: Duration| latency.as_secs_f64() * 1e6;
        Self {
            mean: us(histogram.mean()),
            p50: us(histogram.percentile(500)),
            p90: us(histogram.percentile(900)),
            p99: us(histogram.percentile(990)),
            p99_9: us(histogram.percentile(999)),
            max: us(histogram.max()),
        }
    }
}

impl Report for Measured {
    fn table(&self) -> Table {
        let latency = &self.latency_us;
        Table::pairs()
            .pair(
                "workload",
                format_args!("{}, {} a request", self.workload, Size(self.block_size.into())),
            )
            .pair("queue depth", self.depth)
            .pair("time", format_args!("{:.2} s", self.seconds))
            .pair("requests", format_args!("{} ({:.0}/s)", self.requests, self.requests_per_second))
            .pair("data", format_args!("{} ({})", Size(self.bytes), rate(self.bytes, self.elapsed)))
            .pair(
                "latency",
                format_args!(
                    "mean {:.1} µs, median {:.1}, maximum {:.1}",
                    latency.mean, latency.p50, latency.max
                ),
            )
            .pair(
                "percentiles",
                format_args!(
                    "90: {:.1} µs, 99: {:.1}, 99.9: {:.1}",
                    latency.p90, latency.p99, latency.p99_9
                ),
            )
    }
}

impl Workload {
    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
        }
    }

    const fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Randwrite)
    }

    const fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite)
    }
}

/// Where the requests go, one after the other.
struct Places {
    is_random: bool,
    /// Requests that fit the disk.
    count: u64,
    next: u64,
    random: u64,
}

impl Places {
    fn new(workload: Workload, disk: &DiskInfo, block_size: u32) -> Self {
        let count = disk.bytes() / u64::from(block_size);
        Self { is_random: workload.is_random(), count, next: 0, random: 1 }
    }

    /// Number of the next place, in units of the requests' size.
    fn next(&mut self) -> u64 {
        if self.is_random {
            return pattern::next_word(&mut self.random) % self.count.max(1);
        }
        let place = self.next;
        self.next = (place + 1) % self.count.max(1);
        place
    }
}

fn check(arguments: &Bench, disk: &DiskInfo, limit: u32) -> Result<u32> {
    if arguments.workload.writes() && !arguments.overwrite {
        return Err(Failure::usage(
            format_args!("{} destroys what is on the disk", arguments.workload.name()),
            "say --overwrite if that is meant",
        ));
    }
    let size = arguments.block_size;
    let fits = u64::from(limit).min(disk.bytes());
    match u32::try_from(size.0) {
        Ok(bytes) if bytes > 0 && bytes % disk.block_bytes == 0 && size.0 <= fits => Ok(bytes),
        _ => Err(Failure::usage(
            format_args!("requests of {} bytes are not possible on this disk", size.0),
            format_args!("choose a multiple of {} up to {}", disk.block_bytes, Size(fits)),
        )),
    }
}

/// Requests in flight and what became of those that ended.
struct Run<'a> {
    disk: &'a DiskInfo,
    workload: Workload,
    block_size: u32,
    places: Places,
    /// When the request with this number as its token was submitted.
    submitted: Vec<Instant>,
    idle: Vec<(u64, Buffer)>,
    /// Requests that may still be made.
    left: u64,
    /// Progress is that of the clock, not that of the data.
    is_timed: bool,
    latencies: Histogram,
}

impl Run<'_> {
    /// The next request, unless all buffers are in use or enough were made.
    fn request(&mut self, now: Instant) -> Option<Request> {
        if self.left == 0 {
            return None;
        }
        let (token, buffer) = self.idle.pop()?;
        self.left -= 1;
        let blocks = self.block_size / self.disk.block_bytes;
        let lba = self.places.next() * u64::from(blocks);
        let command = match self.workload.writes() {
            true => Command::write(lba, blocks, false),
            false => Command::read(lba, blocks),
        };
        if let Some(submitted) = self.submitted.get_mut(usize::try_from(token).ok()?) {
            *submitted = now;
        }
        let request = Request::new(self.disk.address, command.encode().ok()?).with_token(token);
        Some(match self.workload.writes() {
            true => request.writing(buffer, 0, self.block_size),
            false => request.reading(buffer, 0, self.block_size),
        })
    }

    fn complete(&mut self, completion: Completion, now: Instant) -> Result<()> {
        completion.result?;
        let index = usize::try_from(completion.token).unwrap_or(usize::MAX);
        if let (Some(at), Some(buffer)) = (self.submitted.get(index), completion.buffer) {
            self.latencies.record(now.duration_since(*at));
            self.idle.push((completion.token, buffer));
        }
        Ok(())
    }

    fn drive(
        &mut self,
        connection: &mut Connection,
        until: Instant,
        progress: &Progress,
    ) -> Result<()> {
        let limit = connection.timeout();
        let client = &mut connection.client;
        loop {
            let now = Instant::now();
            if now < until {
                client.submit_each(|| self.request(now)).map_err(|refused| refused.error)?;
            }
            if client.in_flight() == 0 {
                return Ok(());
            }
            client.wait_completion(limit)?;
            let now = Instant::now();
            while let Some(completion) = client.next_completion() {
                self.complete(completion, now)?;
                if self.is_timed {
                    progress.follow_clock();
                } else {
                    progress.advance(self.block_size.into());
                }
            }
        }
    }
}

pub(crate) fn run(arguments: &Bench, output: &Output) -> Result<()> {
    let depth = arguments.disk.depth;
    let mut connection = Connection::open(&arguments.disk.target, depth)?;
    let disk = connection.disk(arguments.disk.lun)?;
    let block_size = check(arguments, &disk, connection.client.max_transfer_bytes())?;
    let most = arguments.bytes.map_or(u64::MAX, |Size(bytes)| bytes / u64::from(block_size)).max(1);
    let mut run = Run {
        disk: &disk,
        workload: arguments.workload,
        block_size,
        places: Places::new(arguments.workload, &disk, block_size),
        submitted: vec![Instant::now(); depth.into()],
        idle: Vec::with_capacity(depth.into()),
        left: most,
        is_timed: arguments.bytes.is_none(),
        latencies: Histogram::default(),
    };
    for token in 0..depth.into() {
        let buffer = connection.client.allocate(block_size)?;
        if arguments.workload.writes() {
            let mut data = vec![0; block_size as usize];
            pattern::fill(token * u64::from(block_size), 0, &mut data);
            buffer.copy_from(&data)?;
        }
        run.idle.push((token, buffer));
    }
    let length = match arguments.bytes {
        Some(_) => Length::Bytes(most * u64::from(block_size)),
        None => Length::Seconds(arguments.seconds),
    };
    let progress = output.progress(arguments.workload.name(), length);
    let started = Instant::now();
    run.drive(&mut connection, started + Duration::from_secs(arguments.seconds), &progress)?;
    if arguments.workload.writes() {
        connection.client.flush(&disk)?; // what was only promised does not count as written
    }
    let elapsed = started.elapsed();
    drop(progress);
    let requests = run.latencies.count();
    let bytes = requests * u64::from(block_size);
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let requests_per_second = requests as f64 / elapsed.as_secs_f64().max(1e-9);
    output.report(&Measured {
        workload: arguments.workload.name(),
        block_size,
        depth,
        seconds: elapsed.as_secs_f64(),
        requests,
        bytes,
        requests_per_second,
        bytes_per_second: bytes_per_second(bytes, elapsed),
        latency_us: Latency::of(&run.latencies),
        elapsed,
    })
}
