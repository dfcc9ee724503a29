"""The kernel's OOM killer."""

from collections.abc import Callable

import pytest

from ullage.doctor import Diagnosis

Diagnosed = Callable[[str], Diagnosis]
KIB = 1024

# github.com/equinor/ert issue 7797
DMESG = """\
2024-04-29T14:55:41,678628+02:00 pool invoked oom-killer: gfp_mask=0x6200ca(GFP_HIGHUSER_MOVABLE)
2024-04-29T14:55:41,679685+02:00 oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),global_oom,task=perl
2024-04-29T14:55:41,679700+02:00 Out of memory: Killed process 1440763 (perl) total-vm:87033376kB, \
anon-rss:60356340kB, file-rss:0kB, shmem-rss:0kB, UID:21417 pgtables:169956kB oom_score_adj:0
"""
# github.com/reportportal/kubernetes issue 203, with the usage line of mm/memcontrol.c
CGROUP = """\
[ 7063.2] memory: usage 16777216kB, limit 16777216kB, failcnt 4711
[ 7063.247407] Memory cgroup out of memory: Killed process 63214 (python3) total-vm:31494680kB, \
anon-rss:15164992kB, file-rss:52176kB, shmem-rss:92kB, UID:0 pgtables:1372kB oom_score_adj:986
"""
# github.com/pcyin/tranX issue 41, wrapped by a terminal
WRAPPED = """\
[2059991.491542] Out of memory: Killed process 25315 (python3) total-vm:53312244
kB, anon-rss:31451456kB, file-rss:74816kB, shmem-rss:12296kB, UID:0 pgtables:690
68kB oom_score_adj:0
"""
# github.com/ContainerSolutions/runbooks issue 45, kernels before 5.1
OLD = """\
Memory cgroup out of memory: Kill process 1557026 (stress) score 1957 or sacrifice child
Killed process 1557026 (stress) total-vm:256780kB, anon-rss:100056kB, file-rss:264kB, shmem-rss:0kB
"""
# github.com/hmcts/cnp-flux-config pull 28772, and kubectl describe pod
POD = """\
    Last State:     Terminated
      Reason:       OOMKilled
      Exit Code:    137
"""


def test_dmesg_names_the_process_and_what_it_held(diagnosed: Diagnosed) -> None:
    found = diagnosed(DMESG)
    assert found.failed
    assert found.culprit == "host memory"
    assert found.wanted_bytes == 60356340 * KIB
    assert "perl" in found.happened
    assert "all RAM" in found.happened


def test_a_container_is_told_from_the_whole_machine(diagnosed: Diagnosed) -> None:
    found = diagnosed(CGROUP)
    assert "its container's limit of 16.00 GiB" in found.happened
    assert found.total_bytes == 16777216 * KIB
    assert found.wanted_bytes == (15164992 + 52176 + 92) * KIB
    assert "18944m" in found.changes[0].flags  # 1.25 times what it held, in steps of 512 MiB


def test_a_wrapped_line_is_read(diagnosed: Diagnosed) -> None:
    assert diagnosed(WRAPPED).wanted_bytes == (31451456 + 74816 + 12296) * KIB


def test_the_wording_of_old_kernels_is_read(diagnosed: Diagnosed) -> None:
    found = diagnosed(OLD)
    assert found.wanted_bytes == (100056 + 264) * KIB
    assert "container" in found.happened


def test_of_several_kills_the_largest_counts(diagnosed: Diagnosed) -> None:
    assert "perl" in diagnosed(OLD + DMESG).happened


def test_kubernetes_says_that_it_was_the_limit(diagnosed: Diagnosed) -> None:
    found = diagnosed(POD)
    assert "OOMKilled" in found.happened
    assert [line.line for line in found.evidence] == [2, 3]


@pytest.mark.parametrize(
    "text",
    [
        "command terminated with exit code 137",
        "container exited with code 137",
        '"ExitCode": 137,',
        "subprocess.CalledProcessError: Command 'vllm' died with <Signals.SIGKILL: 9>.",
        "./serve.sh: line 3:  4711 Killed                  python -m vllm.entrypoints",
        "Killed\n",
    ],
)
def test_an_exit_code_alone_is_not_called_proof(diagnosed: Diagnosed, text: str) -> None:
    found = diagnosed(text)
    assert found.failed
    assert any("does not prove" in cause for cause in found.causes)


def test_a_kill_after_a_healthy_start_names_the_engine(diagnosed: Diagnosed) -> None:
    start = "INFO 04-22 15:13:20 [kv_cache_utils.py:1314] GPU KV cache size: 188,640 tokens\n"
    found = diagnosed(start + DMESG)
    assert (found.engine, found.phase, found.culprit) == ("vllm", "serve", "host memory")
    assert not found.planned  # RAM is not the device that a plan would be of


LLAMA = "load_tensors:        CUDA0 model buffer size = 18508.35 MiB\n"


@pytest.mark.parametrize("text", [DMESG, CGROUP, POD, "Killed\n"])
def test_no_setting_of_an_engine_that_the_log_does_not_show(
    diagnosed: Diagnosed, text: str
) -> None:
    flags = [change.flags for change in diagnosed(text).changes]
    assert "--memory 80%" in flags
    assert not {"--cache-ram 0", "--cpu-offload-gb 0"} & set(flags)


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        (LLAMA + CGROUP, "--cache-ram 0"),
        (DMESG.replace("(perl)", "(llama-server)"), "--cache-ram 0"),
        ("vllm non-default args: {'model': 'x', 'cpu_offload_gb': 10.0}\n" + POD,
         "--cpu-offload-gb 0"),
        ("vllm args: Namespace(cpu_offload_gb=0.5)\n" + POD, "--cpu-offload-gb 0"),
    ],
)  # fmt: skip
def test_the_engine_in_the_log_gets_its_own_setting(
    diagnosed: Diagnosed, text: str, flag: str
) -> None:
    (change,) = [one for one in diagnosed(text).changes if one.flags == flag]
    assert change.frees_bytes is None  # nobody knows how much of it was in use


def test_vllms_default_is_no_change(diagnosed: Diagnosed) -> None:
    found = diagnosed("vllm args: Namespace(cpu_offload_gb=0.0)\n" + POD)
    assert "--cpu-offload-gb 0" not in [change.flags for change in found.changes]
