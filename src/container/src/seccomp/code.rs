//! Assembles classic BPF from its end to its beginning, so that every jump knows its target when it is written.
//! Knows instructions; what a profile means is decided by its caller.

use libc::sock_filter;

/// Where to go on. Forward only, as BPF jumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Target {
    /// End with this seccomp return value.
    Return(u32),
    /// An instruction that is written already, counted from the end.
    At(usize),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Test {
    Equal,
    Greater,
    GreaterOrEqual,
}

/// The program, last instruction first.
#[derive(Default)]
pub(super) struct Code {
    reversed: Vec<sock_filter>,
    /// The nearest copy of each return.
    returns: Vec<(u32, usize)>,
}

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;
const JUMP: u16 = 0x05;
const EQUAL: u16 = 0x15;
const GREATER: u16 = 0x25;
const GREATER_OR_EQUAL: u16 = 0x35;

impl Code {
    /// Compares the accumulator.
    pub(super) fn branch(&mut self, test: Test, value: u32, yes: Target, no: Target) -> Target {
        if yes == no {
            return yes;
        }
        // Reaching the second target may put one more instruction between us and the first.
        let yes = self.near(yes);
        let no = self.near(no);
        let code = match test {
            Test::Equal => EQUAL,
            Test::Greater => GREATER,
            Test::GreaterOrEqual => GREATER_OR_EQUAL,
        };
        let (jt, jf) = (self.offset(yes), self.offset(no));
        self.push(sock_filter { code, jt, jf, k: value })
    }

    /// Loads a word of `seccomp_data`, then goes on.
    pub(super) fn load(&mut self, offset: u32, then: Target) -> Target {
        self.plain(LOAD, offset, then)
    }

    /// Masks the accumulator, then goes on.
    pub(super) fn and(&mut self, mask: u32, then: Target) -> Target {
        self.plain(AND, mask, then)
    }

    /// The program in its order, beginning at `start`.
    pub(super) fn finish(mut self, start: Target) -> Vec<sock_filter> {
        match start {
            Target::Return(value) => {
                self.push(sock_filter { code: RETURN, jt: 0, jf: 0, k: value });
            }
            Target::At(at) => self.reversed.truncate(at + 1),
        }
        self.reversed.reverse();
        self.reversed
    }

    fn plain(&mut self, code: u16, k: u32, then: Target) -> Target {
        // The next instruction has to be the one right behind.
        match then {
            Target::At(at) if at + 1 == self.reversed.len() => {}
            Target::At(at) => {
                self.jump(at);
            }
            Target::Return(value) => {
                self.push_return(value);
            }
        }
        self.push(sock_filter { code, jt: 0, jf: 0, k })
    }

    /// An instruction within the reach of a conditional jump (8 bits) that leads to `target`.
    fn near(&mut self, target: Target) -> usize {
        let reach = |this: &Code, at: usize| this.reversed.len() - at <= usize::from(u8::MAX);
        match target {
            Target::At(at) if reach(self, at) => at,
            Target::At(at) => self.jump(at),
            Target::Return(value) => match self.returns.iter().find(|(v, _)| *v == value) {
                Some(&(_, at)) if reach(self, at) => at,
                _ => self.push_return(value),
            },
        }
    }

    fn jump(&mut self, at: usize) -> usize {
        // 32 bits reach anywhere: a program has at most 4096 instructions.
        let over = u32::try_from(self.reversed.len() - at - 1).unwrap_or(u32::MAX);
        self.push(sock_filter { code: JUMP, jt: 0, jf: 0, k: over });
        self.reversed.len() - 1
    }

    fn push_return(&mut self, value: u32) -> usize {
        self.push(sock_filter { code: RETURN, jt: 0, jf: 0, k: value });
        let at = self.reversed.len() - 1;
        self.returns.retain(|(v, _)| *v != value);
        self.returns.push((value, at));
        at
    }

    fn push(&mut self, instruction: sock_filter) -> Target {
        self.reversed.push(instruction);
        Target::At(self.reversed.len() - 1)
    }

    fn offset(&self, at: usize) -> u8 {
        u8::try_from(self.reversed.len() - at - 1).unwrap_or(u8::MAX)
    }
}
