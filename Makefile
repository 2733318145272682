# make demo    the tunnel at work over post-quantum TLS: certificates, a server, a client, a page and a file of 50 MB
# make test    the tests
# make check   what a change has to pass: format, lint, types, tests
# make bench   speed, beside `ssh -R` and others: bench/results.* (make bench ARGS="--quick"; --help shows all options)
# make profile where the time goes, per message and per byte
# make attack  attackers of a dozen kinds beside good visitors, 60 s (make attack ARGS="--seconds 600"; so the next ones)
# make faults  a network that cuts, stalls and truncates; processes that are killed, 450 s
# make failover two servers behind HAProxy, one client: each is killed or restarted under load, 60 s; no request fails
# make soak    mixed load with reconnects and reloads, 1,800 s: memory and descriptors stay flat
# make fuzz    a coverage-guided fuzzer on all that is parsed, 600 s
# make interop unrelated TLS stacks at the other end (Go, rustls, BouncyCastle, OpenSSL's tools): tests/interop/results.md
# make clean   removes all that the others made
#
# Each sets up what it needs in $(VENV). Another Python: make clean, then make PYTHON=/path/to/python3 test

PYTHON ?= python3
VENV ?= .venv
IN_VENV = $(VENV)/bin/python

.PHONY: demo test first-half second-half check bench profile attack faults failover soak fuzz interop clean

demo: $(VENV)/installed-test
	@$(IN_VENV) -u tests/demo.py

# Two halves at once, for two processors; what each says is shown when it ends.
FIRST_HALF = $(patsubst %,tests/test_%.py, bench config demo dissector documents drain fuzz haproxy http_proxy \
    interop_tlslite judge leases long_runs machine_faults metrics packaging pki reload servers state_report \
    systemd_units tls_context tls_refusals)

test: $(VENV)/installed-test
	@$(MAKE) --no-print-directory --jobs=2 --output-sync first-half second-half

first-half:
	$(IN_VENV) -m pytest $(FIRST_HALF)

second-half:
	$(IN_VENV) -m pytest $(addprefix --ignore=,$(FIRST_HALF))

check: $(VENV)/installed-dev
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy --strict rtunnel.py rtunnel_tls.py
	$(IN_VENV) tests/sizes.py
	@$(MAKE) --no-print-directory test

bench: $(VENV)/installed-test
	@$(IN_VENV) -u bench/run.py $(ARGS)

profile: $(VENV)/installed-dev
	@$(IN_VENV) -u bench/hotpath.py $(ARGS)

attack faults failover soak: $(VENV)/installed-test
	@$(IN_VENV) -u tests/long/$@.py $(ARGS)

fuzz: $(VENV)/installed-fuzz
	@$(IN_VENV) -u tests/long/fuzz.py $(ARGS)

interop: $(VENV)/installed-test
	@$(IN_VENV) -u tests/interop/run.py

clean:
	rm -rf .venv .venv-ci build dist rtunnel.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf __pycache__ */__pycache__ tests/*/__pycache__ tests/interop/go/build tests/interop/rust/target tests/interop/java/target

# Empty files that say what is done. A new setup.py installs again; an unfinished environment is made anew.

$(VENV)/installed-test $(VENV)/installed-dev $(VENV)/installed-fuzz: $(VENV)/installed-%: setup.py $(VENV)/made
	@echo "Installing rtunnel and what it needs for '$*' in $(VENV) ..."
	@$(IN_VENV) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "rtunnel needs Python 3.10 or newer, and '$(PYTHON)' is not: say which one with 'make PYTHON=...'." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip; ensurepip.version()' 2>/dev/null || \
	    { echo "'$(PYTHON)' has no venv module: install it first (Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
