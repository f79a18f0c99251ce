# What there is to run. `make demo` and `make test` install what they miss by themselves.
.PHONY: demo test lint bench clean

demo: ## watch a database survive its machine
	scripts/setup demo
	cargo build --quiet
	target/debug/perennial demo

test: ## formatting, lints, all tests, with real servers and a real S3 server
	scripts/test

lint:
	cargo fmt --check
	cargo clippy --all-targets --quiet -- --deny warnings

bench: ## Perennial beside pgBackRest and WAL-RUS; takes an hour
	benches/compare/run

clean:
	cargo clean
	rm -rf .tools
