//! Users and groups, by raw system call: libc's wrappers change all threads of a process, and this one has one.

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::error::{At, Failure, Step};

/// Root of a user namespace that was just entered, in place of the id that has no meaning there.
pub(crate) fn become_root() -> Result<(), Failure> {
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    set_thread_res_gid(gid, gid, gid).at(Step::User, "root of the user namespace")?;
    set_thread_res_uid(uid, uid, uid).at(Step::User, "root of the user namespace")?;
    // Entering a namespace or changing ids may have made us visible to those who are in it already.
    crate::kernel::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::User, "root of the user namespace").map(drop)
}

/// Groups first: once the user has changed, it may not.
pub(super) fn become_user(uid: Uid, gid: Gid, groups: &[Gid]) -> Result<(), Failure> {
    set_thread_groups(groups).at(Step::Groups, format_args!("{groups:?}"))?;
    set_thread_res_gid(gid, gid, gid).at(Step::User, format_args!("group {}", gid.as_raw()))?;
    set_thread_res_uid(uid, uid, uid).at(Step::User, uid.as_raw())
}
