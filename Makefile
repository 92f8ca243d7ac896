# One line per target; what they do is in runtime-tests (the program `lab`).
CRISP_CACHE ?= $(HOME)/.cache/crisp
CARGO_TARGET_DIR ?= $(CRISP_CACHE)/target
export CRISP_CACHE CARGO_TARGET_DIR
LAB = cargo run --quiet --release --package crisp-runtime-tests --bin lab --

.PHONY: all build demo check test critest kubelet bench fuzz setup fmt clean

all: build

build:   ; $(LAB) build
demo:    ; $(LAB) demo
check:   ; $(LAB) check
test:    ; $(LAB) test
critest: ; $(LAB) critest $(ARGS)
kubelet: ; $(LAB) kubelet $(ARGS)
bench:   ; $(LAB) bench $(ARGS)
fuzz:    ; $(LAB) fuzz $(ARGS)
setup:   ; $(LAB) setup
fmt:     ; cargo fmt --all
clean:   ; rm -rf "$(CARGO_TARGET_DIR)" "$(CRISP_CACHE)/images" "$(CRISP_CACHE)/registry"
