//go:build tools

// Package tools names what the validation suite and its runtimetest are built from, so that go.sum holds every module
// of theirs.
package tools

import (
	_ "github.com/opencontainers/runtime-tools/cmd/runtimetest"
	_ "github.com/opencontainers/runtime-tools/validation/default"
	_ "github.com/opencontainers/runtime-tools/validation/linux_seccomp"
	_ "github.com/opencontainers/runtime-tools/validation/linux_cgroups_cpus"
	_ "github.com/opencontainers/runtime-tools/validation/process_capabilities"
)
