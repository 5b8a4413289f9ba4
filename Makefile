# Two commands do everything on a fresh Debian 12 with Python 3.11, make and git:
#   make demo    build, install into .venv, and run the main job
#   make test    install what the tests need and run them all
# The rest: build, install, uninstall, bench, bench-density, torture SEEDS=1000, faults, sanitize,
# fuzz SECONDS=60, lint, format, prove WHAT=backbone, clean. System packages are printed first;
# only those that are missing are installed, with sudo where not root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

RUN := .run
VENV := .venv
# `import nbd` must never mean our room of that name: keep the current directory off sys.path.
export PYTHONSAFEPATH := 1

BUILD_PACKAGES := gcc libc6-dev liblz4-dev libxxhash-dev
# Only the system's own Python needs these; another python3 brings its headers and venv.
PYTHON_PACKAGES := python3-dev python3-venv
DEMO_PACKAGES := qemu-system-x86 e2fsprogs busybox-static
TEST_PACKAGES := fio libnbd-bin python3-libnbd nbdkit nbd-client qemu-utils \
	qemu-system-common systemd libvirt-clients libxml2-utils
# A guest with a real kernel, and what it does with a block device.
TEST_PACKAGES += qemu-system-x86 busybox-static e2fsprogs xfsprogs util-linux
# A guest that boots Debian with systemd; what make prove runs.
PROVE_PACKAGES := debootstrap
# libFuzzer and the sanitizers of clang; gcc brings its own.
FUZZ_PACKAGES := clang libclang-rt-dev
BENCH_PACKAGES := fio nbdkit qemu-utils

# The first python3 on PATH that is new enough.
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13 /usr/bin/python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && \
	"$$p" -c 'import sys; print(sys.executable)' && break; done)
ifneq ($(filter /usr/bin/%,$(PYTHON)),)
BUILD_PACKAGES += $(PYTHON_PACKAGES)
endif

# Our C has no warnings; the build machine keeps it so. Elsewhere another compiler may know more.
ifdef CI
export CFLAGS := $(CFLAGS) -Werror
endif

NATIVE := $(wildcard native/*.c native/*.h native/build_native.py)

.PHONY: help demo test torture faults build install uninstall bench lint format prove sanitize \
	fuzz clean
help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

give_up = { echo "make $(1)" >&2; exit 1; }

python_missing = { echo "make: Python 3.11 or newer is needed, found \
	$$(python3 --version 2>&1 || true)" >&2; exit 1; }

# $(call install,what,packages): print the packages, install the missing ones.
define install
	@echo "make $(1): system packages: $(2)"
	if ! command -v dpkg-query > /dev/null; then
		echo "make $(1): not a Debian system: install the equivalents yourself"
	else
		missing=()
		for package in $(2); do
			state=$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>&1 || true)
			[[ $$state == installed ]] || missing+=($$package)
		done
		if (($${#missing[@]})); then
			echo "make $(1): installing $${missing[*]}"
			sudo=()
			if ((EUID != 0)); then
				sudo=(sudo)
				command -v sudo > /dev/null || $(call give_up,not root and no sudo)
			fi
			"$${sudo[@]}" apt-get -qq update
			"$${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
				apt-get -qq install -y --no-install-recommends "$${missing[@]}"
		fi
	fi
	mkdir -p $(RUN)
	touch $@
endef

$(RUN)/build.packages: Makefile
	$(call install,build,$(BUILD_PACKAGES))
$(RUN)/demo.packages: Makefile
	$(call install,demo,$(BUILD_PACKAGES) $(DEMO_PACKAGES))
$(RUN)/test.packages: Makefile
	$(call install,test,$(BUILD_PACKAGES) $(TEST_PACKAGES) $(FUZZ_PACKAGES))
$(RUN)/prove.packages: Makefile
	$(call install,prove,$(PROVE_PACKAGES) $(PYTHON_PACKAGES))
$(RUN)/fuzz.packages: Makefile
	$(call install,fuzz,$(BUILD_PACKAGES) $(FUZZ_PACKAGES))
$(RUN)/bench.packages: Makefile
	$(call install,bench,$(BUILD_PACKAGES) $(BENCH_PACKAGES))

# The virtual environment: Millpond editable, its dependencies and the developer's tools.
$(RUN)/venv: pyproject.toml | $(RUN)/build.packages
	@[[ -n "$(PYTHON)" ]] || $(python_missing)
	[[ -x $(VENV)/bin/python ]] || "$(PYTHON)" -m venv $(VENV)
	echo "make build: installing into $(VENV)"
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

BUILD_EXT := $(VENV)/bin/python -W ignore -c 'import setuptools; setuptools.setup()' -q \
	build_ext --inplace

# The C core again, in place, after an edit.
$(RUN)/native: $(RUN)/venv $(NATIVE)
	@$(BUILD_EXT)
	touch $@

build: $(RUN)/native

# For all users of this machine, or below DESTDIR for a package. Configuration files that were
# edited stay; running daemons keep what they loaded until they are started anew.
PREFIX := /usr/local
SYSCONFDIR := /etc
DESTDIR :=
LIBRARY = $(DESTDIR)$(PREFIX)/lib/millpond
COMMAND = $(DESTDIR)$(PREFIX)/bin/millpond
SETTINGS = $(DESTDIR)$(SYSCONFDIR)/millpond
HOOKS = $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system
RULES = $(DESTDIR)$(PREFIX)/lib/udev/rules.d
SYSUSERS = $(DESTDIR)$(PREFIX)/lib/sysusers.d
UNIT_FILES := $(wildcard cli/system/*.service cli/system/*.socket)
# What people may edit: made where there is none or one as we made it, only removed where it is so.
EDITABLE = $(SETTINGS)/cache.toml $(SETTINGS)/store.toml $(SETTINGS)/tab $(HOOKS)/50-millpond
for_here = sed 's|@COMMAND@|$(PREFIX)/bin/millpond|'
MARK = $(LIBRARY)/installed-by-make
not_ours = [[ ! -e $(LIBRARY) || -e $(MARK) ]] || $(call give_up,$@: $(LIBRARY) is not ours)

install: $(RUN)/build.packages
	@[[ -n "$(PYTHON)" ]] || $(python_missing)
	$(not_ours)
	[[ ! -e $(COMMAND) || -L $(COMMAND) ]] || $(call give_up,$@: $(COMMAND) is not ours)
	mkdir -p $(LIBRARY) $(dir $(COMMAND)) $(SETTINGS) $(HOOKS) $(UNITS) $(RULES) $(SYSUSERS)
	touch $(MARK)
	"$(PYTHON)" -m venv $(LIBRARY)
	echo "make install: installing into $(LIBRARY)"
	$(LIBRARY)/bin/pip install -q --disable-pip-version-check --upgrade .
	for file in $(EDITABLE); do # as an older one made it: made anew below
		if cmp -s $(LIBRARY)/$${file##*/} $$file; then rm $$file; fi
	done
	for kind in cache store; do
		$(LIBRARY)/bin/millpond config sample $$kind > $(LIBRARY)/$$kind.toml
	done
	cp cli/system/tab $(LIBRARY)
	$(for_here) cli/system/50-millpond > $(LIBRARY)/50-millpond
	chmod 755 $(LIBRARY)/50-millpond
	for file in $(EDITABLE); do
		[[ -e $$file ]] || cp $(LIBRARY)/$${file##*/} $$file
	done
	for unit in $(UNIT_FILES); do $(for_here) $$unit > $(UNITS)/$${unit##*/}; done
	cp cli/system/60-millpond.rules $(RULES)
	cp cli/system/millpond.sysusers $(SYSUSERS)/millpond.conf
	if [[ -n "$(DESTDIR)" ]]; then sed -i '1s|^#!$(DESTDIR)|#!|' $(LIBRARY)/bin/millpond; fi
	ln -sfn ../lib/millpond/bin/millpond $(COMMAND)
	echo "make install: $(COMMAND), $(SETTINGS), $(UNITS)"
	if [[ -z "$(filter /usr /usr/local,$(PREFIX))" ]]; then
		echo "make install: systemd, udev and sysusers do not look below $(PREFIX): link" \
			"what is in its lib/{systemd/system,udev/rules.d,sysusers.d} to /etc"
	fi

# What install made, and nothing else: no data, no configuration file that was edited.
uninstall:
	@$(not_ours)
	for file in $(EDITABLE); do
		if cmp -s $(LIBRARY)/$${file##*/} $$file; then rm $$file; fi
		if [[ -e $$file ]]; then echo "make uninstall: $$file was edited and stays"; fi
	done
	rmdir $(SETTINGS) 2> /dev/null || true
	rmdir $(HOOKS) 2> /dev/null || true
	if [[ -e $(MARK) ]]; then
		rm -f $(addprefix $(UNITS)/,$(notdir $(UNIT_FILES))) $(RULES)/60-millpond.rules \
			$(SYSUSERS)/millpond.conf
	fi
	[[ "$$(readlink $(COMMAND))" != ../lib/millpond/bin/millpond ]] || rm $(COMMAND)
	rm -rf $(LIBRARY)

demo: $(RUN)/demo.packages $(RUN)/native
	@PYTHONPATH=bench $(VENV)/bin/python -m demo

test: $(RUN)/test.packages $(RUN)/native
	@$(VENV)/bin/pytest

# Simulated sites in which everything goes wrong: make torture SEEDS=1000 [FIRST=1].
SEEDS := 100
FIRST := 1
torture: $(RUN)/native
	@export PYTHONHASHSEED=0 PYTHONPATH=tests
	$(VENV)/bin/python -m sim.torture --seeds $(SEEDS) --first $(FIRST)

# Each deliberate fault in the code, and where it is caught.
faults: $(RUN)/native
	@PYTHONHASHSEED=0 PYTHONPATH=tests $(VENV)/bin/python -m sim.faults

# The suite over a core with sanitizers, in a copy of the checkout: WHAT=address (and undefined
# behaviour) or WHAT=thread, both if not said; ARGS="tests/native" some of it.
sanitize: $(RUN)/test.packages
	@code=0
	for each in $(or $(WHAT),address thread); do
		"$(PYTHON)" tests/sanitize.py $$each $(ARGS) || code=$$?
	done
	exit $$code

# Every fuzz harness for so long; ARGS="nbd wire" some of them.
SECONDS := 60
fuzz: $(RUN)/fuzz.packages $(RUN)/native
	@PYTHONPATH=tests $(VENV)/bin/python -m fuzz $(SECONDS) $(ARGS)

bench: $(RUN)/bench.packages $(RUN)/native
	@PYTHONPATH=bench $(VENV)/bin/python -m peers $(ARGS)
	if [[ -z "$(filter-out --record,$(ARGS))" ]]; then \
		PYTHONPATH=bench $(VENV)/bin/python -m ingest $(ARGS); fi
	if [[ -z "$(ARGS)" ]]; then $(VENV)/bin/pytest bench/micro; fi

# How many guests one slow store disk serves at equal p99, with the cache and without.
bench-density: $(RUN)/bench.packages $(RUN)/native
	@PYTHONPATH=bench $(VENV)/bin/python -m density $(ARGS)

lint: $(RUN)/native
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -q tests/test_tidy.py

format: $(RUN)/venv
	@$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# make prove WHAT=skeleton: every line of what an issue asked for, with its figure.
prove: $(RUN)/test.packages $(RUN)/demo.packages $(RUN)/prove.packages $(RUN)/native
	@[[ -n "$(WHAT)" ]] || $(call give_up,prove WHAT=NAME: a file of bench/prove)
	PYTHONPATH=bench $(VENV)/bin/python -m prove.$(WHAT) $(ARGS)

clean:
	@rm -rf $(VENV) $(RUN) build dist *.egg-info .hypothesis .benchmarks .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find native -name '*.so' -delete
