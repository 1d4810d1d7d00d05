//! Who holds a port of this machine. Only Linux tells, and of other users' processes only root.

use procfs::net::TcpState;
use procfs::process::{FDTarget, ProcState, Process};
use std::net::SocketAddr;

/// A process that listens.
pub(super) struct Holder {
    pub pid: i32,
    pub name: String,
    /// Stopped by a signal (SIGSTOP), or by a debugger.
    pub is_frozen: bool,
}

/// Returns `None` if that cannot be seen.
pub(super) fn of(listen: SocketAddr) -> Option<Holder> {
    let sockets = procfs::net::tcp().into_iter().chain(procfs::net::tcp6()).flatten();
    let listens = |entry: &procfs::net::TcpNetEntry| {
        let (at, ip) = (entry.local_address, entry.local_address.ip().to_canonical());
        let is_here = ip == listen.ip().to_canonical() || ip.is_unspecified() || listen.ip().is_unspecified();
        entry.state == TcpState::Listen && at.port() == listen.port() && is_here
    };
    let inodes: Vec<u64> = sockets.filter(listens).map(|entry| entry.inode).collect();
    let holds = |process: &Process| {
        // Of a socket that systemd has handed on, the first process holds a copy.
        if process.pid == 1 {
            return false;
        }
        let files = process.fd().into_iter().flatten().flatten();
        files.into_iter().any(|file| matches!(file.target, FDTarget::Socket(inode) if inodes.contains(&inode)))
    };
    let process = procfs::process::all_processes().ok()?.flatten().find(holds)?;
    let stat = process.stat().ok()?;
    let is_frozen = stat.state().is_ok_and(|state| matches!(state, ProcState::Stopped | ProcState::Tracing));
    Some(Holder { pid: stat.pid, name: stat.comm, is_frozen })
}
