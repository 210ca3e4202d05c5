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
tsan    := -O2 -g -fsanitize=thread -fno-omit-frame-pointer
$(if $($(MODE)),,$(error MODE=$(MODE) is none of release debug asan tsan))

PKGS     := lua5.4 jansson libpcre2-8 libutf8proc libmicrohttpd libcurl
# Recursive on purpose: pkg-config is asked only when something is compiled, after `setup`.
PKG_CFLAGS = $(eval PKG_CFLAGS := $$(shell pkg-config --cflags $(PKGS)))$(PKG_CFLAGS)
PKG_LIBS   = $(eval PKG_LIBS := $$(shell pkg-config --libs $(PKGS)))$(PKG_LIBS)
# CI treats warnings as errors; elsewhere another compiler's new warning must not stop a user.
# -iquote: our sched.h must not hide the system's <sched.h>.
CFLAGS   = $(CSTD) $(WARN) $(if $(CI),-Werror) $($(MODE)) -fopenmp \
           -iquote engine -iquote kernels -iquote $(B)/generated $(PKG_CFLAGS)
LDLIBS   = $(PKG_LIBS) $(if $(CUDA_ARCH),$(CUDA_LIBS)) -lm -lpthread

# CUDA: `make CUDA_ARCH=90a` for one architecture, CUDA_ARCH="80 86 89 90a" for all, CUDA_ARCH= for none.
# Where there are an NVIDIA driver and nvcc the default is all; elsewhere nothing of CUDA is needed.
# LINEINFO=1: profilers name source lines. CHAOS=1: timing of kernels is random (chaos in traits.cuh). -O1 is of the host
# code, a launcher for each kernel; code of the GPU is at its highest level anyway.
CUDA      ?= /usr/local/cuda
NVCC      := $(CUDA)/bin/nvcc
CUDA_ARCH ?= $(if $(and $(wildcard /dev/nvidiactl),$(wildcard $(NVCC))),80 86 89 90a)
$(if $(CUDA_ARCH),$(if $(shell command -v $(NVCC)),,$(error CUDA_ARCH=$(CUDA_ARCH), but there is no $(NVCC): \
    CUDA=DIR names the toolkit, CUDA_ARCH= builds without)))
NVFLAGS   := -std=c++17 -O1 $(if $(LINEINFO),-lineinfo) $(if $(CHAOS),-DAMALGAM_CHAOS) -Xptxas -v -Xcompiler -Wall,-Wextra,-fPIC,-iquoteengine,-iquotekernels
GENCODE   := $(foreach a,$(CUDA_ARCH),-gencode=arch=compute_$(a),code=sm_$(a))
KERNEL_BENCHES := $(wildcard $(patsubst %,engine/cmd_bench_%.c,attention linear ops tune))
CUDA_HOST := engine/device_cuda.c $(wildcard engine/cudev_*.c) engine/ceilings.c engine/bench_cuda.c $(KERNEL_BENCHES)
CUDA_LIBS := -L$(CUDA)/lib64 -Wl,-rpath,$(CUDA)/lib64 -lcublas -lcublasLt -lcudart_static -lstdc++ -ldl -lrt -lpthread

SOURCES := $(sort $(filter-out $(if $(CUDA_ARCH),,$(CUDA_HOST)),$(wildcard engine/*.c kernels/*.c)))
# What compiles longest goes first, so that no core waits for it in the end.
SLOW    := $(patsubst %,kernels/%.cu,linear_short linear_ampere attention_decode linear_hopper linear_tall linear_mid)
KERNELS := $(if $(CUDA_ARCH),$(SLOW) $(filter-out $(SLOW),$(sort $(wildcard kernels/*.cu kernels/ladder/*.cu))))
DEVICES := $(if $(CUDA_ARCH),cuda) cpu sim null
BENCHES := $(patsubst engine/cmd_bench_%.c,%,$(KERNEL_BENCHES))
OBJECTS := $(KERNELS:%.cu=$(O)/%.cu.o) $(SOURCES:%.c=$(O)/%.o)
LIBRARY := $(O)/libamalgam.a
TESTS   := $(patsubst tests/%.c,$(O)/tests/%,$(sort $(wildcard tests/test_*.c)))
GPU_TESTS := $(patsubst tests/%.c,$(O)/tests/%,$(sort $(wildcard tests/gpu_*.c)))
REPLAYS := $(patsubst tests/fuzz/%.c,$(O)/tests/%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-builtin-variables

# Goals share outputs (`make gpu-tests build`): they run one after the other, whatever -j says, each with
# a parallel make of its own. A file by name (build/debug/amalgam) may be built in parallel.
PARALLEL = $(MAKE) --no-print-directory -j$(JOBS) INNER=1
ifndef INNER
ifneq ($(filter-out $(B)/%,$(MAKECMDGOALS)),)
.NOTPARALLEL:
endif
endif

##@ Use
help: ## list the targets (this text)
	@awk 'BEGIN { FS = ":.*## " } \
	     /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	     /^[a-z][a-z0-9_%-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the packages that are missing (apt)
	@./install-deps.sh

build: setup ## compile build/amalgam
	+$(Q)$(PARALLEL) $(O)/amalgam

# What was built: commit, hash of the difference of the sources to it, compiler, flags. Rewritten only
# when it changes, so that nothing is compiled again for nothing.
VERSIONED := engine kernels experiments baselines workloads plots Makefile ':!plots/out'
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

# The devices that are built, and the architectures: what depends on them is compiled again when they change.
$(B)/generated/devices.def: FORCE
	@mkdir -p $(@D)
	@{ echo "/* devices.def - DEVICE(name): the devices of this build. */"; \
	  for d in $(DEVICES); do echo "DEVICE($$d)"; done; } > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(B)/generated/bench.def: FORCE
	@mkdir -p $(@D)
	@{ echo "/* bench.def - BENCH(name): the benchmarks of kernels; NO_BENCH(name) in a build without CUDA. */"; \
	  for b in $(BENCHES); do echo "$(if $(CUDA_ARCH),,NO_)BENCH($$b)"; done; } > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(B)/generated/cuda_arch: FORCE
	@mkdir -p $(@D)
	@echo "$(NVCC) $(NVFLAGS) $(GENCODE)" > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(CUDA_HOST:%.c=$(O)/%.o): CFLAGS += -isystem $(CUDA)/include

# Registers and spills of a file's kernels stand in the .ptxas beside its object; a spill fails `gpu-tests`.
# One compiler at a time where NVCC_LOCK names a file: cicc takes gigabytes.
$(O)/%.cu.o: %.cu $(B)/generated/cuda_arch
	@mkdir -p $(@D)
	@echo "  nvcc  $<"
	$(Q)$(if $(NVCC_LOCK),nice -n 19 flock $(NVCC_LOCK)) $(NVCC) $(NVFLAGS) $(GENCODE) -MMD -MP \
	    -c $< -o $@ 2>$@.ptxas || { cat $@.ptxas; rm -f $@; exit 1; }

# They are there before anything is compiled; whose content counts for a file is in its .d then.
GENERATED := $(addprefix $(B)/generated/,version.h devices.def bench.def)
$(O)/%.o: %.c Makefile | $(GENERATED)
	@mkdir -p $(@D)
	@echo "  cc    $<"
	$(Q)$(CC) $(CFLAGS) -MMD -MP -c $< -o $@

$(LIBRARY): $(filter-out $(O)/engine/main.o,$(OBJECTS))
	@rm -f $@
	$(Q)ar rcs $@ $^

$(O)/amalgam: $(O)/engine/main.o $(LIBRARY)
	@echo "  link  $@"
	$(Q)$(CC) $(CFLAGS) -rdynamic -Wl,--disable-new-dtags,-rpath,'$$ORIGIN/lib' $^ -o $@ $(LDLIBS)

$(GPU_TESTS): CFLAGS += -isystem $(CUDA)/include
$(O)/tests/%: tests/%.c tests/test.h $(LIBRARY) Makefile
	@mkdir -p $(@D)
	@echo "  test  $<"
	$(Q)$(CC) $(CFLAGS) -iquote tests -MMD -MP $< $(LIBRARY) -o $@ $(LDLIBS) -lcmocka

# The targets of the fuzzer without it: each runs over the files of its corpus.
$(REPLAYS): $(O)/tests/%: tests/fuzz/%.c tests/fuzz/replay.c tests/fuzz/fuzz.h $(LIBRARY) Makefile
	@mkdir -p $(@D)
	@echo "  test  $<"
	$(Q)$(CC) $(CFLAGS) -iquote tests/fuzz $(filter %.c %.a,$^) -o $@ $(LDLIBS)

-include $(OBJECTS:.o=.d) $(TESTS:=.d) $(GPU_TESTS:=.d)

##@ Reproduce
EXPERIMENTS := $(notdir $(basename $(sort $(wildcard experiments/e[0-9]*.lua))))

# A failed point does not keep the report from being made; it is the exit status all the same. Ctrl-C
# does: PAPER.md and README.md stay as they were.
reproduce: build ## run all experiments, then tables, plots and PAPER.md (about a quarter of an hour)
	$(Q)$(O)/amalgam run $(EXPERIMENTS); status=$$?; [ $$status -ne 130 ] || exit 130; \
	    $(O)/amalgam report && exit $$status

quick: build ## the same on a few points each, under build/quick (about a minute)
	$(Q)$(O)/amalgam run $(EXPERIMENTS) --quick --results $(B)/quick/results; status=$$?; \
	    [ $$status -ne 130 ] || exit 130; \
	    $(O)/amalgam report --results $(B)/quick/results --out $(B)/quick && exit $$status

report: build ## tables, plots and PAPER.md from the results that are stored
	$(Q)$(O)/amalgam report

compare: build ## two versions by their stored results: make compare BASE=… HEAD=…
	$(Q)$(O)/amalgam compare $(BASE) $(HEAD)

bench: build ## what the suite itself costs (null, sim and cpu devices)
	$(Q)$(O)/amalgam bench harness

# Shared libraries travel beside the program, all but the C library, cuBLAS and the driver's own: a node
# needs nothing else installed. The program looks for them in lib/ beside itself (RPATH, so that
# libraries of libraries are found there too).
NODE_FILES := experiments workloads plots baselines results tests/vectors LICENSE README.md
NODE_LIBS  := ld-linux|libc|libm|libdl|librt|libpthread|libcublas|libcublasLt|libcuda
dist: build ## a tarball for a GPU node: the program, its libraries and data, under build/
	@rm -rf $(B)/dist && mkdir -p $(B)/dist/amalgam/lib
	$(Q)cp $(O)/amalgam $(B)/dist/amalgam/
	$(Q)ldd $(O)/amalgam | awk '/=> \// { print $$3 }' | grep -Ev '/($(NODE_LIBS))[-.]' | \
	    xargs -I{} cp -L {} $(B)/dist/amalgam/lib/
	$(Q){ git ls-files $(NODE_FILES) 2>/dev/null || find $(NODE_FILES) -type f; } | \
	    tar cf - -T - | tar xf - -C $(B)/dist/amalgam
	$(Q)name=$(B)/amalgam-$$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown).tar.gz && \
	    tar czf $$name -C $(B)/dist amalgam && ls $$name

##@ Check
test: build ## every check: style, layers, C and Lua tests (under 10 minutes)
	+$(Q)$(PARALLEL) $(TESTS) $(REPLAYS)
	$(Q)tests/run.sh $(O)

asan: setup ## the C tests under the address and undefined-behaviour sanitizers
	+$(Q)$(PARALLEL) MODE=asan $(B)/asan/amalgam asan-tests
	$(Q)tests/run.sh $(B)/asan

asan-tests: $(TESTS) $(REPLAYS)

# Loops on one thread: of the barriers of OpenMP's runtime it knows nothing.
tsan: setup ## the server's tests under the thread sanitizer (3 minutes)
	+$(Q)$(PARALLEL) MODE=tsan $(B)/tsan/amalgam $(B)/tsan/tests/test_server
	$(Q)OMP_THREAD_LIMIT=1 AMALGAM_BINARY=$(B)/tsan/amalgam $(B)/tsan/tests/test_server

gpu-tests: setup ## build the tests of the kernels and of the cuda device (CUDA_ARCH=…)
	+$(Q)$(PARALLEL) $(O)/amalgam $(GPU_TESTS)
	$(Q)! grep -H -E '[1-9][0-9]* bytes spill|C75(0[0-9]|1[0-8])' $(KERNELS:%.cu=$(O)/%.cu.o.ptxas)

gpu-test: gpu-tests ## run them; needs a GPU
	$(Q)for t in $(GPU_TESTS); do echo "  $$t" && $$t || exit 1; done

# libFuzzer over everything that reads what others wrote: tests/fuzz/fuzz_NAME.c and its corpus. A finding
# stays as build/fuzz/NAME-crash-…; what was learnt, in build/fuzz/NAME.
FUZZ_SECONDS ?= 60
FUZZ_CC    := clang-14
FUZZ_FLAGS := -O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all
FUZZED     := $(filter-out engine/main.c engine/cmd_% engine/lua_api.c engine/device% engine/serv% \
    $(CUDA_HOST),$(wildcard engine/*.c)) kernels/ref_quant.c

$(B)/fuzz/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(Q)$(FUZZ_CC) $(CSTD) $(FUZZ_FLAGS) -iquote engine -iquote kernels -iquote $(B)/generated \
	    $(PKG_CFLAGS) -MMD -MP -c $< -o $@

$(B)/fuzz/engine/results.o: $(B)/generated/version.h

# An archive: each target takes the readers that it needs.
$(B)/fuzz/library.a: $(FUZZED:%.c=$(B)/fuzz/%.o)
	@rm -f $@
	$(Q)ar rcs $@ $^

$(B)/fuzz/%.run: tests/fuzz/fuzz_%.c tests/fuzz/fuzz.h $(B)/fuzz/library.a
	@echo "  fuzz  $<"
	$(Q)$(FUZZ_CC) $(CSTD) $(FUZZ_FLAGS) -fsanitize=fuzzer -iquote engine -iquote kernels -iquote tests/fuzz \
	    $(PKG_CFLAGS) $(filter %.c %.a,$^) -o $@ $(LDLIBS)

fuzz-%: $(B)/fuzz/%.run ## fuzz a reader: chat_template http_body config … (FUZZ_SECONDS=60)
	@mkdir -p $(B)/fuzz/$*
	$(Q)$< -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 \
	    -artifact_prefix=$(B)/fuzz/$*- $(B)/fuzz/$* tests/fuzz/corpus/$*

format: ## rewrite the C sources with clang-format 14
	$(Q)clang-format-14 -i $(wildcard engine/*.[ch] kernels/*.[ch] kernels/ladder/*.h tests/*.[ch] tests/fuzz/*.[ch])

clean: ## remove build/ (results stay)
	rm -rf $(B)

FORCE:
.PRECIOUS: $(B)/fuzz/%.o $(B)/fuzz/%.run
.PHONY: help setup build dist reproduce quick report compare bench test asan asan-tests tsan gpu-tests \
        gpu-test format clean FORCE
