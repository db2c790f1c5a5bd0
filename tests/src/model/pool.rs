//! Values of the product as small numbers. A state of the model names a session's core or a row of the books by its
//! number, so that it is small to hash and to compare, and what the product's code does with it is computed once.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::{Debug, Write};
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::{OnceLock, PoisonError, RwLock};

/// A value's identity: 128 bits of the text by which it is told from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity(u64, u64);

struct Digester(DefaultHasher, DefaultHasher);

impl Write for Digester {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.write(text.as_bytes());
        self.1.write(text.as_bytes());
        Ok(())
    }
}

impl Identity {
    pub fn of(value: &impl Debug) -> Self {
        let mut digester = Digester(DefaultHasher::new(), DefaultHasher::new());
        digester.1.write_u8(1);
        write!(digester, "{value:?}").expect("a hasher takes everything");
        Self(digester.0.finish(), digester.1.finish())
    }
}

/// A quick hash of small keys.
#[derive(Debug, Default, Clone)]
pub struct Quick(u64);

impl Hasher for Quick {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }
    fn write_u8(&mut self, n: u8) {
        self.write_u64(u64::from(n));
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }
    fn write_isize(&mut self, n: isize) {
        self.write_u64(n as u64);
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

type QuickMap<K, V> = HashMap<K, V, BuildHasherDefault<Quick>>;

/// A list that only grows; what is in it is read without a lock.
#[derive(Debug)]
struct List<T> {
    /// The n-th part has room for 2^n values.
    parts: [OnceLock<Box<[OnceLock<T>]>>; 32],
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self { parts: [const { OnceLock::new() }; 32] }
    }
}

impl<T> List<T> {
    fn place(number: u32) -> (usize, usize) {
        let part = (number + 1).ilog2();
        (part as usize, (number + 1 - (1 << part)) as usize)
    }

    fn set(&self, number: u32, value: T) {
        let (part, at) = Self::place(number);
        let room = || (0..1usize << part).map(|_| OnceLock::new()).collect();
        let fresh = self.parts[part].get_or_init(room)[at].set(value).is_ok();
        assert!(fresh, "a number names one value");
    }

    fn get(&self, number: u32) -> &T {
        let (part, at) = Self::place(number);
        self.parts[part].get().and_then(|part| part[at].get()).expect("only numbers of values that are there are told")
    }
}

/// Values by number, and numbers by key.
#[derive(Debug)]
pub struct Pool<T, K = Identity> {
    numbers: RwLock<QuickMap<K, u32>>,
    values: List<T>,
}

impl<T, K> Default for Pool<T, K> {
    fn default() -> Self {
        Self { numbers: RwLock::default(), values: List::default() }
    }
}

impl<T, K: Hash + Eq> Pool<T, K> {
    fn number(&self, key: &K) -> Option<u32> {
        self.numbers.read().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }

    /// The number of the value of this key. The first one that is met stands for all.
    pub fn put(&self, key: K, value: T) -> u32 {
        if let Some(number) = self.number(&key) {
            return number;
        }
        let mut numbers = self.numbers.write().unwrap_or_else(PoisonError::into_inner);
        let next = numbers.len() as u32;
        *numbers.entry(key).or_insert_with(|| {
            self.values.set(next, value);
            next
        })
    }

    pub fn get(&self, number: u32) -> &T {
        self.values.get(number)
    }

    /// The answer of a pure function, computed once.
    pub fn answer(&self, question: K, compute: impl FnOnce(&K) -> T) -> &T {
        let known = self.number(&question);
        self.get(known.unwrap_or_else(|| {
            let answer = compute(&question);
            self.put(question, answer)
        }))
    }

    pub fn len(&self) -> usize {
        self.numbers.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
