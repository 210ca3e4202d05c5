# Amalgam: mixed-precision LLM inference and its evaluation. `make` prints the targets.

MODE ?= release
V    ?=
JOBS ?= $(shell nproc)
Q    := $(if $(V),,@)
B    := build
O    := $(if $(filter release,$(MODE)),$(B),$(B)/$(MODE))

CC      := gcc
CSTD    := -std=c17 -D_POSIX_C_SOURCE=200809L
WARN    := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes \
           -Wmissing-prototypes -Wundef
release := -O3 -g -fno-math-errno
debug   := -O0 -g3
asan    := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
$(if $($(MODE)),,$(error MODE=$(MODE) is none of release debug asan))

PKGS     := lua5.4 jansson libpcre2-8 libutf8proc openblas
# Recursive on purpose: pkg-config is asked only when something is compiled, after `setup`.
PKG_CFLAGS = $(eval PKG_CFLAGS := $$(shell pkg-config --cflags $(PKGS)))$(PKG_CFLAGS)
PKG_LIBS   = $(eval PKG_LIBS := $$(shell pkg-config --libs $(PKGS)))$(PKG_LIBS)
# CI treats warnings as errors; elsewhere another compiler's new warning must not stop a user.
# -iquote: our sched.h must not hide the system's <sched.h>.
CFLAGS   = $(CSTD) $(WARN) $(if $(CI),-Werror) $($(MODE)) -fopenmp \
           -iquote engine -iquote kernels -iquote $(B)/generated $(PKG_CFLAGS)
LDLIBS   = $(if $(SM),$(STATIC_LIBS) $(CUDA_LIBS),$(PKG_LIBS)) -lm

# Idle OpenMP threads sleep: spinning ones wait for a core that another process holds, which makes the
# cpu device ten times slower on a machine that is not ours alone.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

# CUDA: `make CUDA_ARCH=90a` compiles kernels/*.cu for one architecture, CUDA_ARCH=all for all that are
# supported, CUDA_ARCH= (empty) for none. The default is the GPU at hand, and none where there is no GPU
# or no nvcc, so that a machine without one never compiles a kernel. Files named *_hopper.cu are
# compiled for 90a only; nothing in the host sources depends on any of this (weak symbols).
CUDA      ?= $(firstword $(wildcard /usr/local/cuda) /usr)
NVCC      := $(firstword $(wildcard $(CUDA)/bin/nvcc) $(shell command -v nvcc))
SM_ALL    := 80 86 89 90a
CUDA_ARCH ?= $(if $(and $(NVCC),$(wildcard /dev/nvidia0)),$(patsubst 90,90a,$(shell \
               nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)))
SM        := $(if $(filter all,$(CUDA_ARCH)),$(SM_ALL),$(CUDA_ARCH))
gencode    = $(foreach a,$(1),-gencode arch=compute_$(a),code=sm_$(a))
NVFLAGS   := -std=c++17 -O3 -lineinfo -Xptxas -v,-warn-spills -Iengine -Ikernels
CUDA_SOURCES := $(if $(SM),$(sort $(filter-out $(if $(filter 90a,$(SM)),,%_hopper.cu),$(wildcard kernels/*.cu))))
CUDA_OBJECTS := $(CUDA_SOURCES:%.cu=$(O)/%.o)
# With kernels the program is for a GPU node that has the CUDA runtime and cuBLAS and little else: what
# else it needs is linked into it.
STATIC_LIBS = -Wl,-Bstatic $(PKG_LIBS) -lgomp -Wl,-Bdynamic
CUDA_LIBS   = -L$(CUDA)/lib64 -lcublas -lcublasLt -Wl,-Bstatic -lcudart_static -Wl,-Bdynamic \
              -static-libgcc -static-libstdc++ -lstdc++ -lpthread -ldl -lrt

SOURCES := $(sort $(wildcard engine/*.c kernels/*.c))
OBJECTS := $(SOURCES:%.c=$(O)/%.o)
LIBRARY := $(O)/libamalgam.a
TESTS   := $(patsubst tests/%.c,$(O)/tests/%,$(sort $(wildcard tests/test_*.c)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-builtin-variables

##@ Use
help: ## list the targets (this text)
	@awk 'BEGIN { FS = ":.*## " } \
	     /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	     /^[a-z][a-z0-9_-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the packages that are missing (apt)
	@./install-deps.sh

build: setup ## compile build/amalgam
	$(Q)$(MAKE) --no-print-directory -j$(JOBS) $(O)/amalgam

# What was built: commit, hash of the difference of the sources to it, compiler, flags. Rewritten only
# when it changes, so that nothing is compiled again for nothing.
VERSIONED := engine kernels experiments baselines workloads plots Makefile
$(B)/generated/version.h: FORCE
	@mkdir -p $(@D)
	@commit=$$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown); \
	diff=$$({ git diff HEAD -- $(VERSIONED); git ls-files -o --exclude-standard -- $(VERSIONED) | \
	    xargs -r sha1sum; } 2>/dev/null | sha1sum | cut -c1-8); \
	[ "$$diff" = da39a3ee ] && diff=; \
	{ echo "#define AMALGAM_COMMIT \"$$commit\""; echo "#define AMALGAM_DIFF \"$$diff\""; \
	  echo "#define AMALGAM_CC \"$$($(CC) --version | head -1)\""; \
	  echo "#define AMALGAM_CFLAGS \"$($(MODE)) -fopenmp\""; } > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(O)/engine/results.o $(O)/engine/main.o: $(B)/generated/version.h

$(O)/%.o: %.c Makefile
	@mkdir -p $(@D)
	@echo "  cc    $<"
	$(Q)$(CC) $(CFLAGS) -MMD -MP -c $< -o $@

# The report of registers and spills of a file stands beside its object; ptxas.txt has all of them.
$(CUDA_OBJECTS): $(O)/%.o: %.cu Makefile
	@mkdir -p $(@D)
	@echo "  nvcc  $<"
	$(Q)$(NVCC) $(NVFLAGS) $(call gencode,$(if $(filter %_hopper.cu,$<),90a,$(SM))) -MMD -MP \
	    -c $< -o $@ 2>$@.ptxas || { cat $@.ptxas; rm -f $@; exit 1; }

$(O)/ptxas.txt: $(CUDA_OBJECTS)
	@cat $(^:=.ptxas) >$@

$(LIBRARY): $(filter-out $(O)/engine/main.o,$(OBJECTS)) $(CUDA_OBJECTS)
	@rm -f $@
	$(Q)ar rcs $@ $^

$(O)/amalgam: $(O)/engine/main.o $(LIBRARY)
	@echo "  link  $@"
	$(Q)$(CC) $(CFLAGS) -rdynamic $^ -o $@ $(LDLIBS)

# Tests that want a GPU; with libraries they are linked like the program.
GPU_TESTS := $(if $(SM),$(patsubst tests/%.c,$(O)/tests/%,$(wildcard tests/gpu_*.c)))
$(GPU_TESTS): $(O)/tests/%: tests/%.c $(LIBRARY) Makefile
	@mkdir -p $(@D)
	@echo "  test  $<"
	$(Q)$(CC) $(CFLAGS) -iquote tests -MMD -MP $< $(LIBRARY) -o $@ $(LDLIBS)

$(O)/tests/%: tests/%.c tests/test.h $(LIBRARY) Makefile
	@mkdir -p $(@D)
	@echo "  test  $<"
	$(Q)$(CC) $(CFLAGS) -iquote tests -MMD -MP $< $(LIBRARY) -o $@ $(LDLIBS) -lcmocka

-include $(OBJECTS:.o=.d) $(CUDA_OBJECTS:.o=.d) $(TESTS:=.d) $(GPU_TESTS:=.d)

##@ Reproduce
reproduce: build ## run all experiments, then tables, plots and PAPER.md (about 12 minutes)
	$(Q)for e in experiments/e[0-9]*.lua; do $(O)/amalgam run $$e || exit 1; done
	$(Q)$(O)/amalgam report

quick: build ## the same on a few points each, under build/quick (about a minute)
	$(Q)for e in experiments/e[0-9]*.lua; do \
	    $(O)/amalgam run $$e --quick --results $(B)/quick/results || exit 1; done
	$(Q)$(O)/amalgam report --results $(B)/quick/results --out $(B)/quick

report: build ## tables, plots and PAPER.md from the results that are stored
	$(Q)$(O)/amalgam report

compare: build ## two versions by their stored results: make compare BASE=… HEAD=…
	$(Q)$(O)/amalgam compare $(BASE) $(HEAD)

bench: build ## what the suite itself costs (null, sim and cpu devices)
	$(Q)$(O)/amalgam bench harness

##@ Check
test: build ## every check: style, layers, C and Lua tests (under 10 minutes)
	$(Q)$(MAKE) --no-print-directory -j$(JOBS) $(TESTS)
	$(Q)tests/run.sh $(O)

asan: setup ## the C tests under the address and undefined-behaviour sanitizers
	$(Q)$(MAKE) --no-print-directory -j$(JOBS) MODE=asan $(B)/asan/amalgam asan-tests
	$(Q)tests/run.sh $(B)/asan

asan-tests: $(TESTS)

gpu-test: build ## the kernels against float64, on a GPU (CUDA_ARCH must not be empty)
	$(Q)$(MAKE) --no-print-directory -j$(JOBS) $(GPU_TESTS) $(O)/ptxas.txt
	$(Q)! grep -E '[1-9][0-9]* bytes spill|C75[0-9][0-9]' $(O)/ptxas.txt
	$(Q)for t in $(GPU_TESTS); do $$t check || exit 1; done

format: ## rewrite the C sources with clang-format 14
	$(Q)clang-format-14 -i $(wildcard engine/*.[ch] kernels/*.[ch] tests/*.[ch])

clean: ## remove build/ (results stay)
	rm -rf $(B)

FORCE:
FORCE_SM := $(shell mkdir -p $(O); echo '$(SM)' | cmp -s - $(O)/sm || echo '$(SM)' >$(O)/sm)
.PHONY: help setup build reproduce quick report compare bench test asan asan-tests gpu-test format clean FORCE
