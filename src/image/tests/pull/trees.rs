facts![];
use crate::facts;
