"""How many processors there are to use: trees of control groups as Linux shows them, in and outside of containers."""

import os

import pytest
from processes import run_script

from fastattn import _processors

V2 = "29 23 0:26 {top} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {top} {mount} rw,relatime shared:9 - cgroup cgroup rw,{controllers}"


class Tree:
    """A file system with what is read of it; a callable that adds a group's quota."""

    def __init__(self, root):
        self.root = root

    def process(self, cgroup, *mounts):
        self.write("proc/self/cgroup", *cgroup)
        self.write("proc/self/mountinfo", "23 1 254:0 / / rw,relatime - ext4 /dev/root rw", *mounts)
        return self

    def write(self, path, *lines):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))

    def limit_v2(self, folder, text):
        self.write(f"{folder}/cpu.max", text)

    def limit_v1(self, folder, quota, period=100_000):
        self.write(f"{folder}/cpu.cfs_quota_us", quota)
        self.write(f"{folder}/cpu.cfs_period_us", period)

    def quota(self):
        return _processors.cgroup_quota(self.root)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_no_control_groups(tree):
    assert tree.quota() is None


def test_files_that_make_no_sense(tree):
    tree.process(["", "0", "4:cpu", "0::/app"], "", "- cgroup2", "1 2 - cgroup2 x y", V2.format(top="/", mount="/groups"))
    tree.limit_v2("groups/app", "100000 100000")
    assert tree.quota() == 1.0


@pytest.mark.parametrize(
    "text, quota",
    [("max 100000", None), ("150000 100000", 1.5), ("20000 10000", 2.0), ("max", None), ("", None), ("x y", None), ("0 0", None)],
)
def test_version_2(tree, text, quota):
    tree.process(["0::/app"], V2.format(top="/", mount="/sys/fs/cgroup"))
    tree.limit_v2("sys/fs/cgroup/app", text)
    assert tree.quota() == quota


@pytest.mark.parametrize("quota, period, expected", [(-1, 100_000, None), (250_000, 100_000, 2.5), (5_000, 10_000, 0.5), (0, 1, None)])
def test_version_1(tree, quota, period, expected):
    mounts = [
        V1.format(top="/", mount="/sys/fs/cgroup/memory", controllers="memory"),
        V1.format(top="/", mount="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"),
    ]
    tree.process(["5:memory:/other", "4:cpu,cpuacct:/app", "3:cpuset:/elsewhere", "0::/"], *mounts)
    tree.limit_v1("sys/fs/cgroup/cpu,cpuacct/app", quota, period)
    tree.limit_v1("sys/fs/cgroup/memory/other", 1_000)  # another hierarchy, which has nothing to say
    assert tree.quota() == expected


@pytest.mark.parametrize("limits, quota", [((None, 3.0, 8.0), 3.0), ((4.0, None, 2.0), 2.0), ((1.0, 6.0, 6.0), 1.0)])
def test_the_smallest_quota_of_nested_groups_holds(tree, limits, quota):
    tree.process(["0::/a/b/c"], V2.format(top="/", mount="/sys/fs/cgroup"))
    for folder, limit in zip(("a", "a/b", "a/b/c"), limits):
        tree.limit_v2(f"sys/fs/cgroup/{folder}", f"{'max' if limit is None else int(limit * 100_000)} 100000")
    tree.limit_v2("sys/fs", "1 100000")  # above the mount point
    assert tree.quota() == quota


@pytest.mark.parametrize(
    "group, top, folder",
    [
        ("/docker/7f3a/app", "/docker/7f3a", "app"),  # the host's names, and the container's own group mounted as the root
        ("/docker/7f3a", "/docker/7f3a", ""),
        ("/", "/", ""),  # a namespace of its own
        ("/../sibling", "/", ""),  # a group outside of the namespace
        ("/docker/7f3a", "/somewhere/else", ""),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_what_a_container_sees(tree, version, group, top, folder):
    if version == 2:
        tree.process([f"0::{group}"], V2.format(top=top, mount="/sys/fs/cgroup"))
        tree.limit_v2(f"sys/fs/cgroup/{folder}", "300000 100000")
    else:
        tree.process([f"4:cpu:{group}"], V1.format(top=top, mount="/sys/fs/cgroup/cpu", controllers="cpu"))
        tree.limit_v1(f"sys/fs/cgroup/cpu/{folder}", 300_000)
    assert tree.quota() == 3.0


def test_both_versions_and_a_mount_point_with_a_blank(tree):
    mounts = [V2.format(top="/", mount=r"/run/my\040groups"), V1.format(top="/", mount="/cpu", controllers="cpu")]
    tree.process(["1:cpu:/x", "0::/x"], *mounts)
    tree.limit_v2("run/my groups/x", "400000 100000")
    assert tree.quota() == 4.0
    tree.limit_v1("cpu/x", 200_000)
    assert tree.quota() == 2.0


@pytest.mark.parametrize(
    "affinity, quota, expected",
    [
        (8, None, (8, "affinity")),
        (8, "1250000 100000", (8, "affinity")),
        (8, "800000 100000", (8, "affinity")),
        (8, "799999 100000", (7, "cgroup quota")),
        (8, "150000 100000", (1, "cgroup quota")),
        (8, "50000 100000", (1, "cgroup quota")),  # never none
        (1, "50000 100000", (1, "cgroup quota")),
    ],
)
def test_the_smaller_of_affinity_and_quota(tree, monkeypatch, affinity, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    tree.process(["0::/app"], V2.format(top="/", mount="/sys/fs/cgroup"))
    if quota:
        tree.limit_v2("sys/fs/cgroup/app", quota)
    assert _processors.usable(tree.root) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_affinity_is_that_at_import(monkeypatch):
    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_script("""
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import fastattn
        config = fastattn.show_config("dicts")
        assert config["threads"] == config["cpu"]["usable_cpus"] == 1 and config["threads_from"] in ("affinity", "cgroup quota")
        """)


@pytest.mark.parametrize("variable", ["FASTATTN_NUM_THREADS", "OMP_NUM_THREADS"])
def test_where_the_number_of_threads_came_from(variable, monkeypatch):
    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    run_script(
        f"""
        import contextlib, io
        import fastattn
        assert fastattn.show_config("dicts")["threads_from"] == {variable!r}
        with fastattn.threads(2):
            assert fastattn.show_config("dicts")["threads_from"] != {variable!r}
        fastattn.set_num_threads(5)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            fastattn.show_config()
        assert "5, from set_num_threads" in printed.getvalue()
        """,
        **{variable: "3"},
    )
