"""An obvious model of the tables of `interop.vllm.window`."""


class Model:
    """Which blocks have slots, in a dictionary, for a number of requests; see `interop.vllm.window.HotTables`."""

    def __init__(self, spec, requests):
        self.spec, self.step = spec, 0
        self.slot, self.used = {}, [0] * (requests * spec.entries)

    def wanted(self, blocks, length):
        """Blocks that a request reads in full precision, by their number; those of the window last."""
        size = self.spec.block
        first = [0] if self.spec.sinks and length else []
        begin = max(length - self.spec.window, 0) // size
        tail = [i for i in range(begin, -(-length // size)) if self.spec.window]
        return first, tail, {i: blocks[i] for i in (*first, *tail) if blocks[i]}

    def update(self, rows, begun):
        """A step of requests, by blocks and tokens of each, that writes the first tokens of the blocks `begun`."""
        self.step += 1
        marked = [self.wanted(*row)[2] for row in rows]
        for block in (block for one in marked for block in one.values()):
            if block in self.slot:
                self.used[self.slot[block]] = self.step
        for block in (block for one in marked for block in one.values()):
            if block in begun and block not in self.slot:
                slot = min(range(len(self.used)), key=lambda i: self.used[i])
                if self.used[slot] == self.step:
                    continue
                self.slot = {b: s for b, s in self.slot.items() if s != slot} | {block: slot}
                self.used[slot] = self.step

    def read(self, blocks, length):
        """First tokens and latest tokens that are exact: [0, begin) and [stop, length)."""
        first, tail, _ = self.wanted(blocks, length)
        stop = length
        for i in reversed(tail):
            if blocks[i] not in self.slot:
                break
            stop = i * self.spec.block
        exact = bool(first) and blocks[0] in self.slot and stop >= self.spec.block
        return (self.spec.block if exact else 0), stop
