"A run that is stopped in the middle of a task"
from asibkd.trainers.loop import Callback

class Stop(Exception): "What a callback of ours ends a run with"

class StopCB(Callback):
    "End the run after an epoch of a phase (the second of task 3's student), before that epoch's checkpoint"
    order = 80
    def __init__(self, phase='t3-B', epoch=1): self.phase, self.epoch = phase, epoch
    def after_epoch(self, loop):
        if loop.phase.name == self.phase and loop.epoch == self.epoch: raise Stop

class StopInStep(Callback):
    "End the run before its step number `step`, whatever the phase"
    def __init__(self, step): self.left = step
    def before_step(self, loop):
        self.left -= 1
        if not self.left: raise Stop
