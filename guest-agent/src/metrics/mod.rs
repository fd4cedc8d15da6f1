//! MetricsService: what goes on in the guest, read from /proc when it is asked, and
//! at no other time.
//!
//! The parsers are our own: those of the procfs crate read all that there is of a
//! process and keep a descriptor for each, and refuse a whole file for one field that
//! is not as they know it. These take what they find, and are small.

mod disks;
mod kernel;
mod processes;

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, SystemTime};

use rustix::param::clock_ticks_per_second;
use soulbox_proto::guest::v1::metrics_service_server::MetricsService;
use soulbox_proto::guest::v1::{GetMetricsRequest, GetMetricsResponse};
use tonic::{Request, Response, Status};

use self::processes::Processes;
use crate::spec::Violations;
use crate::status::internal;
use crate::system::boot_time_us;

const MAX_PROCESSES: u32 = 1000;

/// Serves MetricsService.
#[derive(Clone, Default)]
pub(crate) struct Metrics;

/// What /proc counts CPU time in, proc(5).
#[derive(Clone, Copy)]
struct Ticks {
    per_second: u64,
}

#[tonic::async_trait]
impl MetricsService for Metrics {
    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let most = request.into_inner().processes;
        if most > MAX_PROCESSES {
            let problem = format!("must be at most {MAX_PROCESSES}");
            return Err(Violations::of("processes", &problem).into());
        }
        // On a thread of its own: the command line of a process whose memory is busy,
        // or a disk that hangs, must not stop the agent.
        let measured = tokio::task::spawn_blocking(move || measure(most)).await;
        let measured = measured.map_err(|error| internal(format!("not measured: {error}")))?;
        Ok(Response::new(measured))
    }
}

/// What cannot be read is absent, or 0.
fn measure(most_processes: u32) -> GetMetricsResponse {
    let ticks = Ticks::of_kernel();
    let stat = kernel::stat(&read("/proc/stat"), ticks);
    let uptime_us = boot_time_us();
    let now = SystemTime::now();
    let booted = now - Duration::from_micros(uptime_us);
    let processes = Processes::look(most_processes, ticks, booted);
    let pressure = ["cpu", "memory", "io"].into_iter().filter_map(|name| {
        let pressure = kernel::pressure(&read(&format!("/proc/pressure/{name}")))?;
        Some((name.to_owned(), pressure))
    });
    GetMetricsResponse {
        time: Some(now.into()),
        uptime_us,
        cpus: u32::try_from(stat.per_cpu.len()).unwrap_or(u32::MAX),
        cpu: Some(stat.all),
        per_cpu: stat.per_cpu,
        load: kernel::load(&read("/proc/loadavg")),
        memory: Some(kernel::memory(&read("/proc/meminfo"))),
        disks: disks::look(&read("/proc/self/mountinfo")),
        pressure: pressure.collect::<HashMap<_, _>>(),
        running_processes: stat.running,
        total_processes: processes.total,
        processes: processes.busiest,
    }
}

/// A file of the kernel's, in which only names can be something else than ASCII.
fn read(path: &str) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

// === impl Ticks ===

impl Ticks {
    fn of_kernel() -> Self {
        Self {
            per_second: clock_ticks_per_second().max(1),
        }
    }

    fn to_us(self, ticks: u64) -> u64 {
        ticks.saturating_mul(1_000_000) / self.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_this_machine() {
        let metrics = measure(1000);
        let cpu = metrics.cpu.unwrap();
        assert!(cpu.user_us > 0 && cpu.system_us > 0 && metrics.uptime_us > 0);
        assert_eq!(metrics.cpus as usize, metrics.per_cpu.len());
        assert!(metrics.cpus > 0 && metrics.load.len() == 3);
        let memory = metrics.memory.unwrap();
        assert!(0 < memory.available_bytes && memory.available_bytes <= memory.total_bytes);
        assert!(memory.cached_bytes <= memory.total_bytes);
        let root = metrics.disks.iter().find(|disk| disk.mount_point == "/");
        assert!(
            root.is_some_and(|root| 0 < root.used_bytes && root.used_bytes <= root.total_bytes)
        );

        let own = std::process::id();
        let own = metrics.processes.iter().find(|process| process.pid == own);
        let own = own.unwrap();
        assert!(own.resident_bytes > 0 && own.threads > 0 && !own.command_line.is_empty());
        let started = SystemTime::try_from(own.start_time.unwrap()).unwrap();
        assert!(started <= SystemTime::now());
        assert!(metrics.total_processes as usize >= metrics.processes.len());
        let times = metrics.processes.iter().map(|process| process.cpu_us);
        assert!(times.is_sorted_by(|one, next| one >= next));

        let none = measure(0);
        assert!(none.processes.is_empty() && none.total_processes > 0);
    }
}
