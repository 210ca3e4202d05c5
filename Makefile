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

PKGS     := lua5.4 jansson libpcre2-8 openblas
# Recursive on purpose: pkg-config is asked only when something is compiled, after `setup`.
PKG_CFLAGS = $(eval PKG_CFLAGS := $$(shell pkg-config --cflags $(PKGS)))$(PKG_CFLAGS)
PKG_LIBS   = $(eval PKG_LIBS := $$(shell pkg-config --libs $(PKGS)))$(PKG_LIBS)
# CI treats warnings as errors; elsewhere another compiler's new warning must not stop a user.
CFLAGS   = $(CSTD) $(WARN) $(if $(CI),-Werror) $($(MODE)) -fopenmp -iquote engine -iquote kernels $(PKG_CFLAGS)
LDLIBS   = $(PKG_LIBS) -lm

# Idle OpenMP threads sleep: spinning ones wait for a core that another process holds, which makes the
# cpu device ten times slower on a machine that is not ours alone.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

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

$(O)/%.o: %.c Makefile
	@mkdir -p $(@D)
	@echo "  cc    $<"
	$(Q)$(CC) $(CFLAGS) -MMD -MP -c $< -o $@

$(LIBRARY): $(filter-out $(O)/engine/main.o,$(OBJECTS))
	@rm -f $@
	$(Q)ar rcs $@ $^

$(O)/amalgam: $(O)/engine/main.o $(LIBRARY)
	@echo "  link  $@"
	$(Q)$(CC) $(CFLAGS) -rdynamic $^ -o $@ $(LDLIBS)

$(O)/tests/%: tests/%.c tests/test.h $(LIBRARY) Makefile
	@mkdir -p $(@D)
	@echo "  test  $<"
	$(Q)$(CC) $(CFLAGS) -iquote tests -MMD -MP $< $(LIBRARY) -o $@ $(LDLIBS) -lcmocka

-include $(OBJECTS:.o=.d) $(TESTS:=.d)

.PHONY: help setup build
