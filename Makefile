# What there is to run. `make demo` and `make test` install what they miss by themselves.
.PHONY: demo test lint torture large bench bench-increments install clean

demo: ## watch a database survive its machine
	scripts/setup demo
	cargo build --quiet
	target/debug/perennial demo

test: ## formatting, lints, all tests, with real servers and a real S3 server
	scripts/test

lint:
	cargo fmt --check
	cargo clippy --all-targets --quiet -- --deny warnings

torture: ## kill machines under load, again and again: ROUNDS=50, SEED=…
	PERENNIAL_TORTURE_ROUNDS=$(or $(ROUNDS),50) $(if $(SEED),PERENNIAL_SEED=$(SEED)) scripts/test --test torture -- --ignored --nocapture --test-threads=1

large: ## a hundred thousand segments and a thousand backups: list, verify, prune, copy
	scripts/test --test large -- --ignored --nocapture

bench: ## Perennial beside pgBackRest and WAL-RUS, and the cost of commits; takes half an hour
	benches/compare/setup
	cargo build --release --quiet
	benches/compare/run --output target/benchmarks.md
	benches/commits/run | tee target/commits.md

bench-increments: ## increments beside pgBackRest's and WAL-RUS's; takes over an hour at scale 300 (SCALE=100: half of that)
	benches/compare/setup
	cargo build --release --quiet
	benches/compare/increments --scale $(or $(SCALE),300) --output target/increments.md

PREFIX ?= /usr/local
install: ## program, man pages and completions
	cargo build --release --quiet
	install -D -m 755 target/release/perennial $(DESTDIR)$(PREFIX)/bin/perennial
	install -d $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	target/release/perennial man $(DESTDIR)$(PREFIX)/share/man/man1
	target/release/perennial completions bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/perennial

clean:
	cargo clean
	rm -rf .tools
