"""Machines of an SFT run, in torchrun's words."""

from dataclasses import dataclass

from future_l1_plugin.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """How the processes of a run find one another. The default is one machine, this one.

    Attributes:
        count: machines, each with as many processes.
        rank: which of them this is, 0..count-1.
        address, port: where node 0 is reached by all; address None: this machine, at a port that is free.
    """

    count: int = 1
    rank: int = 0
    address: str | None = None
    port: int = 29500  # torchrun's own

    @classmethod
    def of(cls, count: int | None, rank: int | None, address: str | None, port: int | None) -> "Nodes":
        """What a command line says, None where it says nothing. scripts/sft.sh takes these from variables.

        Raises ConfigError: something is missing, out of range, or without effect.
        """
        given = {"--node-rank (NODE_RANK)": rank, "--master-addr (MASTER_ADDR)": address}
        given["--master-port (MASTER_PORT)"] = port
        if count is None:
            if alone := [name for name, value in given.items() if value is not None]:
                raise ConfigError(
                    f"{', '.join(alone)} without --nnodes (NNODES): each machine would train a run of its own. Say how "
                    "many machines there are, or leave it out"
                )
            return cls()
        if count < 1:
            raise ConfigError(f"--nnodes (NNODES): expected at least 1, found {count}")
        if count > 1:
            needed = {"--node-rank (NODE_RANK)": f"which of them this is, 0..{count - 1}"}
            needed["--master-addr (MASTER_ADDR)"] = "where all of them reach node 0"
            for name, what in needed.items():
                if given[name] is None:
                    raise ConfigError(f"--nnodes (NNODES) {count}: {name} is missing. Say {what}")
        if not 0 <= (rank or 0) < count:
            raise ConfigError(f"--node-rank (NODE_RANK): expected 0..{count - 1} with {count} nodes, found {rank}")
        if port is not None and address is None:
            raise ConfigError(
                "--master-port (MASTER_PORT) without --master-addr (MASTER_ADDR): one machine needs neither"
            )
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"--master-port (MASTER_PORT): expected 1..65535, found {port}")
        return cls(count, rank or 0, address, port or cls.port)

    def torchrun(self, gpus: int) -> list[str]:
        """Arguments of the interpreter that start `gpus` processes on this machine; the program follows."""
        where = ["--standalone"]
        if self.address is not None:
            where = ["--nnodes", str(self.count), "--node-rank", str(self.rank)]
            where += ["--master-addr", self.address, "--master-port", str(self.port)]
        return ["-m", "torch.distributed.run", *where, "--nproc-per-node", str(gpus)]


def same_for_all(output: str, seen: str) -> None:
    """Every process of a run calls this with what it found in `output`: they must go on from one and the same state.

    Raises ConfigError, in each of them: they see different things.
    """
    from accelerate.utils import gather_object

    found = gather_object([seen])
    if len(set(found)) > 1:
        each = "; ".join(f"process {i}: {what}" for i, what in enumerate(found))
        raise ConfigError(
            f"output: the processes see different things in {output} ({each}). Put it on a file system that all "
            "machines share, and start again"
        )
