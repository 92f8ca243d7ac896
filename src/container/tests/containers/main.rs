//! Real containers on this kernel, as root: what the library promises, as facts.
//!
//! This binary has a harness of its own. The library clones without an exec and its children allocate, which is
//! sound in a process with one thread only; the usual harness runs each test in a thread of its own.

// The racing neighbour is a fork, and one ioctl has no safe form.
#![allow(unsafe_code)]
// All of this is a test, though clippy cannot tell without the usual harness.
#![allow(clippy::unwrap_used)]

mod attacks;
mod basics;
mod hooks;
mod lab;
mod mounts;
mod namespaces;
mod process;
mod volumes;

use std::panic::{AssertUnwindSafe, catch_unwind};

use lab::Lab;

type Test = (&'static str, fn(&Lab));

/// Names the functions of a module as tests.
macro_rules! facts {
    ($($module:ident: $($test:ident,)*;)*) => {
        &[$($((concat!(stringify!($module), "::", stringify!($test)), $module::$test as fn(&Lab)),)*)*]
    };
}

const TESTS: &[Test] = facts! {
    basics:
        a_container_runs_its_program,
        an_exec_sees_the_container,
        a_program_that_cannot_be_executed_fails_the_start,
        a_program_that_cannot_be_executed_fails_the_exec,
        a_missing_program_is_reported_under_the_strictest_filter,
        an_exec_in_a_container_that_has_ended_fails,
        a_container_that_was_not_waited_for_leaves_nothing,
        a_container_that_was_never_started_ends_by_itself,
        a_child_that_is_killed_on_its_way_is_told_from_one_that_failed,
        a_child_that_takes_too_long_is_ended,
        what_can_never_work_is_told_before_anything_is_made,
    ;
    process:
        the_user_and_all_groups_are_as_asked,
        values_that_are_not_text_arrive_as_they_are,
        home_comes_from_passwd_unless_it_is_given,
        a_hostile_passwd_costs_neither_time_nor_the_start,
        a_missing_working_directory_is_made,
        a_working_directory_that_only_the_user_may_enter_is_entered,
        the_exec_of_a_missing_working_directory_fails,
        limits_are_set_or_clamped_with_a_warning,
        the_oom_score_is_set_or_left_with_a_warning,
        root_has_its_bounding_set_and_s12_nothing_to_inherit,
        a_user_has_the_ambient_set_and_no_more,
        no_capabilities_means_none,
        no_new_privileges_is_as_asked,
        signals_and_session_are_fresh,
        the_seccomp_filter_is_in_force_with_and_without_no_new_privileges,
        a_filter_that_does_not_compile_is_an_invalid_specification,
        s10_only_the_standard_streams_are_open,
        s10_a_working_directory_behind_a_descriptor_is_refused,
        the_process_can_open_its_own_streams_again,
        s08_streams_that_nobody_gave_are_the_null_device_of_the_host,
        scheduling_is_as_asked,
        the_personality_is_as_asked,
        an_exec_runs_on_the_cpus_it_asks_for,
        s11_the_child_cannot_be_traced_before_its_exec,
        a_terminal_is_the_containers_own,
        an_exec_gets_a_terminal_of_the_container,
        streams_and_specification_must_agree_about_the_terminal,
    ;
    mounts:
        binds_show_the_host_and_obey_their_attributes,
        a_file_is_bound_on_a_file_that_is_made_for_it,
        sources_are_relative_to_the_bundle,
        a_missing_source_is_named,
        recursive_attributes_reach_the_mounts_below,
        propagation_is_private_slave_or_shared_as_asked,
        file_systems_take_their_parameters,
        a_parameter_that_does_not_exist_is_named_by_the_kernel,
        the_usual_file_systems_are_there,
        dangling_links_at_mount_points_lead_inside,
        dev_has_the_usual_nodes_and_none_of_the_images,
        devices_are_made_as_asked,
        a_container_without_a_dev_gets_one,
        ids_of_a_volume_are_shifted,
        shared_memory_is_shared,
        masked_paths_are_empty_and_closed,
        read_only_paths_refuse_writes,
        s09_a_read_only_root_is_read_only_from_the_hosts_side_too,
        the_bundles_own_root_is_used_in_place,
        a_root_that_is_bound_obeys_its_options,
        layers_lie_on_each_other,
        the_root_propagates_as_asked,
        the_container_is_born_in_its_cgroup_and_sees_it_as_the_root,
        the_container_sees_its_own_cgroup_and_cannot_write,
    ;
    namespaces:
        what_is_not_listed_is_the_hosts,
        the_namespaces_of_a_pod_outlive_who_made_them,
        sysctls_reach_a_network_namespace_that_exists,
        s15_sysctls_stay_in_the_container,
        namespaces_are_joined_by_path,
        a_shared_pid_namespace_has_a_reaper,
        a_user_namespace_owns_all_that_is_new_and_ids_are_shifted,
        a_container_joins_the_user_namespace_of_its_pod,
        volumes_of_a_user_namespace_are_shifted_when_asked,
        a_user_namespace_works_with_the_hosts_network,
        a_user_namespace_has_terminals,
        a_mapping_that_makes_no_sense_is_refused,
    ;
    attacks:
        s01_proc_and_sys_behind_a_link_are_refused,
        s01_volumes_on_and_in_proc_and_on_sys_are_refused,
        a_file_that_programs_replace_in_proc_may_be_replaced,
        s03_mount_points_are_never_made_outside,
        s02_s03_a_racing_neighbour_gets_nothing_out_of_the_root,
        s04_masks_are_made_of_our_own_null_device,
        s07_links_in_place_of_dev_or_its_nodes_lead_nowhere,
        s14_the_process_is_in_its_cgroup_and_so_is_every_exec,
        s17_devices_that_were_not_allowed_cannot_be_opened,
        nothing_of_the_host_is_left_in_the_mount_table,
    ;
    volumes:
        the_layers_of_an_image_are_a_volume_that_nobody_writes,
        a_declared_volume_is_written_beside_the_image,
        more_layers_than_fit_one_option_are_a_volume_too,
        a_single_layer_is_a_volume_too,
        in_a_user_namespace_an_image_volume_belongs_to_its_root,
        in_a_user_namespace_a_container_mounts_its_own_image,
    ;
    hooks:
        hooks_run_in_their_order_and_places,
        a_hook_that_fails_stops_the_container,
        a_hook_that_takes_too_long_is_ended,
    ;
};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let chosen = |name: &str| {
        let mut filters = words.iter().filter(|word| !word.starts_with("--")).peekable();
        filters.peek().is_none() || filters.any(|filter| name.contains(filter.as_str()))
    };
    let tests: Vec<&Test> = TESTS.iter().filter(|(name, _)| chosen(name)).collect();
    if words.iter().any(|word| word == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let lab = Lab::new();
    let mut failed = Vec::new();
    for (name, test) in &tests {
        let passed = catch_unwind(AssertUnwindSafe(|| test(&lab))).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(name);
        }
        lab.reap_strays();
    }
    let leaks = lab.close();
    println!("\n{} passed; {} failed", tests.len() - failed.len(), failed.len());
    for leak in &leaks {
        println!("left behind: {leak}");
    }
    if !failed.is_empty() || !leaks.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}
