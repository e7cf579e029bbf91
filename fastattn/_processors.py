"""How many processors this process may use: those that it may run on, and what the quotas of its control groups leave of them.

A container is limited by a quota more often than by an affinity: it sees every processor of its host and may run on all of them,
for a part of the time. More threads than the quota has whole processors would be stopped together, for most of a tenth of a second,
whenever they have used it up.
"""

import os
import re
from pathlib import PurePosixPath


def usable(root="/"):
    """How many processors there are to use, at least 1, and what limits them.

    Parameters
    ----------
    root : path
        Where the file system begins, for tests.

    Returns
    -------
    count : int
        The smaller of the affinity and the quota, of which a fraction of a processor counts as none.
    source : {"affinity", "cgroup quota"}
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(root)
    if quota is None or quota >= count:
        return count, "affinity"
    return max(1, int(quota)), "cgroup quota"


def cgroup_quota(root="/"):
    """The processors that the control groups of this process (Linux, version 1 and 2) grant it, a float, or None for no limit.

    A group may use no more than the groups around it, so the smallest quota on the way up to the mounted root holds.
    """
    smallest = None
    for version, folder, mount in _groups(root):
        for group in (folder, *folder.parents):
            limit = _limit(version, os.path.join(root, str(group).lstrip("/")))
            if limit is not None and (smallest is None or limit < smallest):
                smallest = limit
            if group == mount:
                break
    return smallest


def _groups(root):
    """Of each mounted hierarchy that rules processors: its version, the folder of this process's group, and the mount point."""
    paths = {}  # the group by version
    for line in _lines(root, "proc/self/cgroup"):
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if not controllers:
            paths[2] = path
        elif "cpu" in controllers.split(","):
            paths[1] = path
    for line in _lines(root, "proc/self/mountinfo"):
        # id, parent, device, root of the mount within the hierarchy, mount point, options, optional fields, "-", type, source, options
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        version = {"cgroup": 1, "cgroup2": 2}.get(kind[0] if kind else None)
        if len(fields) < 5 or version not in paths or (version == 1 and "cpu" not in kind[-1].split(",")):
            continue
        top, mount = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        group = PurePosixPath(paths[version])
        # A container may see its own group as the root of all, or the host's names of groups that are not mounted for it.
        inside = group.relative_to(top) if ".." not in group.parts and group.is_relative_to(top) else ""
        yield version, mount / inside, mount


def _limit(version, folder):
    """The quota of one group in processors, or None."""
    try:
        if version == 2:
            quota, period = next(iter(_lines(folder, "cpu.max")), "max").split()
        else:
            (quota,), (period,) = (_lines(folder, f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        quota, period = float(quota), float(period)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _unescaped(path):
    """A path of mountinfo, where blanks are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
