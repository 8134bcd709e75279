# A thin front over CMake. Options go the same way: make BUILD=build-clang CMAKE_FLAGS=-DCMAKE_C_COMPILER=clang
#
#   make          build/moe4, build/libmoe4.so and build/libmoe4.a, from what is installed
#   make run      installs what is missing, builds, and runs the bundled model's layer 3 in every mode
#   make check    the same, then all tests
#   make bench    installs what is missing, builds, and prints the CPU's main figures beside their floors, in two or three minutes
#   make install  to PREFIX (/usr/local), below DESTDIR
#   make dist     build/moe4-VERSION.tar.gz of what is committed: the same bytes wherever it is made
#   make deb      Debian packages from that tarball, in build/deb
#   make format   clang-format over the tree
BUILD ?= build
PREFIX ?= /usr/local
CMAKE_FLAGS ?=
CTEST_FLAGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# Asked for when the build folder is made; what it has later stays.
FIRST = $(if $(wildcard $(BUILD)/CMakeCache.txt),,-DMOE4_TESTS=OFF $(if $(shell command -v ninja),-G Ninja))
CONFIGURE = cmake -S . -B $(BUILD) $(FIRST) $(CMAKE_FLAGS) -Wno-dev --log-level=WARNING
# With the flags of this make, the one below would announce every folder.
COMPILE = env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL cmake --build $(BUILD) -j $(JOBS)
VERSION = $(shell awk '/^project/ { print $$3 }' CMakeLists.txt)
SOURCES = $(shell find * -name 'build*' -prune -o -name '*.[ch]' -print)

all:
	@$(CONFIGURE) >/dev/null || { echo "make: that is missing; make run installs it, or says which packages to install" >&2; exit 1; }
	@$(COMPILE)

run:
	@scripts/install-deps build
	@$(MAKE) --no-print-directory all
	@scripts/run-demo $(BUILD)/moe4

bench:
	@scripts/install-deps build
	@$(MAKE) --no-print-directory all
	@scripts/run-bench $(BUILD)/moe4

check:
	@scripts/install-deps check
	@$(MAKE) --no-print-directory run
	@scripts/make-venv $(BUILD)/venv
	@$(CONFIGURE) -DMOE4_TESTS=ON >/dev/null
	@$(COMPILE)
	@ctest --test-dir $(BUILD) --output-on-failure $(CTEST_FLAGS)

install: all
	DESTDIR=$(DESTDIR) cmake --install $(BUILD) --prefix $(PREFIX)

dist:
	@mkdir -p $(BUILD)
	git archive --prefix=moe4-$(VERSION)/ HEAD | gzip -9n >$(BUILD)/moe4-$(VERSION).tar.gz

deb: dist
	packaging/build-deb $(BUILD)/moe4-$(VERSION).tar.gz $(BUILD)/deb

format:
	clang-format -i $(SOURCES)

clean:
	rm -rf $(BUILD)

.PHONY: all run bench check install dist deb format clean
