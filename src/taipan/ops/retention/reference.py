"""Retention as it is said: who is in the window is a list, looked through for every entry."""

import torch

from taipan.ops.retention.inputs import NEVER, Entering, Held, Retained


def retain(entering: Entering, held: Held, *, recent: int) -> Retained:
    """See `taipan.ops.retention.retain`."""
    (batch, entries), slots = entering.strength_BS.shape, held.ordinal_BW.shape[1]
    until_BJ = torch.full((batch, slots + entries), NEVER)
    source_BW = torch.full((batch, slots), -1)
    count_B = held.count_B.clone()
    for row in range(batch):
        # ordinal, strength, slot and place of what is in the window
        window = [
            (int(held.ordinal_BW[row, slot]), float(held.strength_BW[row, slot]), slot, slot)
            for slot in range(slots)
            if held.ordinal_BW[row, slot] >= 0
        ]
        document, count = 0, int(count_B[row])
        for number in range(entries):
            if not entering.present_BS[row, number]:
                continue
            if entering.segment_BS is not None and int(entering.segment_BS[row, number]) != document:
                document, window, count = int(entering.segment_BS[row, number]), [], 0
            slot = len(window)
            if slot == slots:
                # of those that are not among the newest once this one is in: the weakest, then the oldest
                weakest = min((entry for entry in window if entry[0] <= count - recent), key=lambda e: (e[1], e[0]))
                window.remove(weakest)
                _, _, slot, place = weakest
                until_BJ[row, place] = count
            window.append((count, float(entering.strength_BS[row, number]), slot, slots + number))
            count += 1
        if entering.last_segment_B is not None and int(entering.last_segment_B[row]) != document:
            window, count = [], 0
        for _, _, slot, place in window:
            source_BW[row, slot] = place
        count_B[row] = count
    return Retained(
        held_until_BW=until_BJ[:, :slots], until_BS=until_BJ[:, slots:], source_BW=source_BW, count_B=count_B
    )
